"""Runs with AWQ: what is reloaded, what is left alone and said so, and runs that were stopped or shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ranks import two_ranks
from runs import compress as run
from runs import digests, steps
from thorough import some
from tiny import VOCABULARY
from torch import Tensor

from compress.blockwise.forward import last_hidden
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.methods.quant.rtn import RTN
from compress.methods.transform import awq
from compress.methods.transform.awq import AWQ
from compress.report.rows import read_rows
from compress.runs.pipeline import Settings

Tiny = Callable[..., Path]


CPU = torch.device("cpu")
TRANSFORM = {"transforms": [{"method": "transform/awq"}]}


RTN3 = steps("quant/rtn", bits=3, group_size=16)


def test_a_grid_that_nobody_names_or_that_does_not_divide_is_an_error(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from compress.methods.method import Method

    class Other(Method):
        """Without a grid."""

    complaint = AWQ(bits=4).check_before((8, 32), Other())
    assert complaint is not None
    assert "has no group_size and no symmetric" in complaint
    assert AWQ(bits=4, group_size=8, symmetric=True).check_before((8, 32), Other()) is None
    with pytest.raises(RecipeError, match=r"transforms\.0: transform/awq: .*in=32 is not a multiple of group_size=24"):
        run(tiny("llama"), tmp_path / "out", ids, RTN3, transforms=[{"method": "transform/awq", "options": {"group_size": 24}}])
    with pytest.raises(RecipeError, match=r"transforms\.0\.options.*nothing is left to do"):
        options = {"scale": False, "clip": False}
        run(tiny("llama"), tmp_path / "out", ids, RTN3, transforms=[{"method": "transform/awq", "options": options}])
    with pytest.raises(ValidationError):
        AWQ(points=1)


def notes(out: Path) -> dict[str, dict[str, Any]]:
    return {row.site: row.notes["transform/awq"] for row in read_rows(out / "report.jsonl")}


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        result: Tensor = model(PROBE, use_cache=False).logits
    return result


FAMILIES = ("llama", "gemma2", "opt", "gpt2", "qwen2_moe", "deepseek_v3", "gpt_oss")
PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", some(FAMILIES, "llama", "gpt_oss"))
def test_a_run_reloads_with_the_logits_of_its_file(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from compress.verify.verify import verify

    out = tmp_path / "out"
    summary = run(tiny(family), out, ids, RTN3, **TRANSFORM).values
    streamed, hidden = last_hidden(PackedSource.open_packed(out), PROBE, torch.float32, CPU)
    with streamed.embeddings_and_head():
        streamed = streamed.logits(PROBE, hidden)
    torch.testing.assert_close(logits(out), streamed, rtol=1e-5, atol=1e-5)
    assert summary["bytes_after"] == Source.open(out).nbytes
    assert verify(out, "cpu", lambda *_: None)["sites"] == len(notes(out))
    found = notes(out)
    assert any(note.get("alpha", 0) > 0 and note["loss"] < 1 for note in found.values())
    assert all("alpha" in note or "scales" in note for note in found.values())
    assert "transform/awq" in (out / "recipe.yaml").read_text()
    assert (out / "report.html").is_file()
    assert (out / "README.md").is_file()


def test_the_model_stays_closer_to_the_original(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Where norms let some channels through much louder than others; geometric mean over two models."""
    ratio = 1.0
    for seed in range(2):
        model = loud(tiny("llama", num_hidden_layers=1, seed=seed), tmp_path / f"loud{seed}")
        original = logits(model)
        error = {}
        for name, stages in (("plain", []), ("awq", [{"method": "transform/awq", "options": {"clip": False}}])):
            out = tmp_path / f"{name}{seed}"
            run(model, out, ids, steps("quant/rtn", bits=4, group_size=16), transforms=stages)
            error[name] = float((logits(out) - original).norm())
        ratio *= error["awq"] / error["plain"]
    assert ratio**0.5 < 0.85


def loud(model: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A copy whose norms scale channels by very different amounts, as in models that were trained for long."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensors[name] = tensor * torch.exp(1.5 * torch.randn(tensor.shape, generator=generator))
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_norms_in_bfloat16_are_divided_by_what_their_readers_get(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """What is rounded is the weight times the quotient of the norms as they are on disk: nothing is lost to their rounding."""
    model = loud(tiny("llama"), tmp_path / "loud", torch.bfloat16)
    run(
        model,
        tmp_path / "out",
        ids,
        steps("quant/rtn", bits=2, group_size=16),
        transforms=[{"method": "transform/awq", "options": {"clip": False}}],
    )
    source, made = Source.open(model), PackedSource.open_packed(tmp_path / "out")
    changed = 0
    for block in range(3):
        for norm, linear in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.up_proj")):
            name = f"model.layers.{block}.{norm}.weight"
            before, after = source.tensor(name), made.tensor(name)
            assert after.dtype == torch.bfloat16
            changed += not torch.equal(before, after)
            if linear == "mlp.up_proj":
                continue  # its rows have been divided, too
            expected = source.tensor(f"model.layers.{block}.{linear}.weight").float() * (before.double() / after.double()).float()
            codes = RTN(bits=2, group_size=16)(expected, {}).weight
            stored = made.compressed(f"model.layers.{block}.{linear}")
            assert torch.equal(codes.base.codes, stored.base.codes)
    assert changed >= 4


def test_experts_without_tokens_and_inputs_without_variety(tiny: Tiny, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.full((1, 2), 5, dtype=np.int32))
    run(tiny("mixtral"), tmp_path / "out", tmp_path / "one.npy", RTN3, **TRANSFORM)
    made = PackedSource.open_packed(tmp_path / "out")
    assert all(made.compressed(site).dequantize().isfinite().all() for site in made.table)
    silent = [row for row in read_rows(tmp_path / "out" / "report.jsonl") if row.kind.endswith("w2")]
    assert any(row.notes["transform/awq"]["alpha"] == 0 for row in silent)
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_a_set_with_a_reader_that_stays_is_left_and_the_note_says_so(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    some = steps("quant/rtn", ["*.q_proj", "*.v_proj", "*.o_proj", "*.up_proj", "*.down_proj"], bits=3, group_size=16)
    options = {"transforms": [{"method": "transform/awq", "options": {"clip": False}}]}
    run(tiny("llama"), tmp_path / "out", ids, some, **options)
    found = notes(tmp_path / "out")
    assert found["model.layers.0.self_attn.q_proj"] == {
        "scales": "self_attn.k_proj is not compressed by this recipe, or not matched"
    }
    assert "mlp.gate_proj is not compressed" in found["model.layers.0.mlp.up_proj"]["scales"]
    assert "alpha" in found["model.layers.0.mlp.down_proj"]
    source, made = Source.open(tiny("llama")), Source.open(tmp_path / "out")
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.k_proj", "mlp.gate_proj"):
        name = f"model.layers.0.{name}.weight"
        assert torch.equal(source.tensor(name), made.tensor(name))


def test_an_inferred_family_takes_the_scales_of_the_written_one(tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from compress.architecture.families import llama

    transform = [{"method": "transform/awq", "options": {"clip": False}}]
    run(tiny("llama"), tmp_path / "written", ids, RTN3, transforms=transform)
    monkeypatch.setattr(llama, "FAMILIES", ())
    run(tiny("llama"), tmp_path / "inferred", ids, RTN3, transforms=transform)
    assert digests(tmp_path / "inferred") == digests(tmp_path / "written")


def test_passes_give_the_bytes_of_one_pass(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    run(model, tmp_path / "one", ids, RTN3, **TRANSFORM)
    run(model, tmp_path / "many", ids, RTN3, settings=Settings(memory=1), **TRANSFORM)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


@pytest.mark.parametrize(
    "more", some([{}, {"settings": Settings(offload=True)}, {"settings": Settings(snapshot_seconds=0.0)}], {})
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(more: dict[str, Any], tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if block == 1:
            raise Stop

    recipe, model = {**TRANSFORM, **more}, tiny("mixtral", num_hidden_layers=2)
    gptq = steps(bits=3, group_size=16)
    run(model, tmp_path / "whole", ids, gptq, **recipe)
    with pytest.raises(Stop):
        run(model, tmp_path / "out", ids, gptq, progress=progress, **recipe)
    run(model, tmp_path / "out", ids, gptq, **recipe)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_two_processes_choose_the_scales_of_one(forks: Any, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    flags = ["--method", "awq", "--bits", "3", "--group-size", "16", "--data", ids, "--dtype", "float32", "-q"]
    two_ranks(
        forks,
        tmp_path,
        "quantize",
        tiny("mixtral"),
        "-o",
        tmp_path / "two",
        *flags,
        "--set",
        "batch_tokens=64",
        "-q",
        "--no-reload",
    )
    run(tiny("mixtral"), tmp_path / "one", ids, RTN3, **TRANSFORM)
    one, two = notes(tmp_path / "one"), notes(tmp_path / "two")
    assert [note["alpha"] for note in one.values()] == [note["alpha"] for note in two.values()]
    first, second = Source.open(tmp_path / "one"), Source.open(tmp_path / "two")
    assert set(first.entries) == set(second.entries)
    for name in first.entries:
        if name.endswith("norm.weight") or name.endswith("gate.weight"):
            assert torch.equal(first.tensor(name), second.tensor(name))


def test_a_method_on_the_command_line_may_have_transforms_before_it() -> None:
    from compress.recipe.build import method_line

    assert method_line("awq") == (["transform/awq"], "quant/rtn")
    assert method_line("awq+gptq") == (["transform/awq"], "quant/gptq")
    assert method_line("transform/awq+quant/gptq") == (["transform/awq"], "quant/gptq")
    assert method_line("gptq") == ([], "quant/gptq")
    with pytest.raises(RecipeError, match=r"quant/gptq cannot go before another method"):
        method_line("gptq+awq")


def test_methods_lists_it(capsys: Any) -> None:
    from compress.screen.methods import describe_methods, show_methods

    found = describe_methods()
    assert found["transform/awq"]["needs"] == ["Magnitude", "Hessian"]
    assert all(option["about"] for option in found["transform/awq"]["options"].values())
    show_methods(found)
    assert "transform/awq" in capsys.readouterr().out
    assert json.dumps(found)
    assert awq.METHOD is AWQ
