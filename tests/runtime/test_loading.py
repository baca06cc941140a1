"""Loading with transformers: whole or loudly not at all, round trips, and no dense copy in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from runs import compress as run
from runs import steps
from safetensors.torch import load_file, save_file
from thorough import some
from tiny import TINY, VOCABULARY, tiny_config
from transformers import AutoModelForCausalLM
from weights import random_weight

import compress
from compress.blockwise.forward import last_hidden
from compress.checkpoint import packing, site_table
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import save
from compress.errors import CheckpointError, FormatError
from compress.kernels import int4_cpu
from compress.runtime.linear import CompressedLinear

Tiny = Callable[..., Path]
Steps = list[dict[str, Any]]
PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
# Experts add up their tokens' outputs in another order than the fused module.
TOLERANCE = 1e-5


def rtn(match: str | list[str] = "*.*", bits: int = 4, **options: Any) -> dict[str, Any]:
    return {"match": match, "method": "quant/rtn", "options": {"bits": bits, "group_size": 16, **options}}


def several(*wanted: dict[str, Any]) -> Steps:
    return list(wanted)


def load(folder: Path, **options: Any) -> Any:
    """Load a checkpoint; nothing may be missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **{"dtype": torch.float32, **options})
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(PROBE, use_cache=False).logits
    return result


def streamed(folder: Path) -> torch.Tensor:
    streamed, hidden = last_hidden(PackedSource.open_packed(folder), PROBE, torch.float32, torch.device("cpu"))
    with streamed.embeddings_and_head():
        return streamed.logits(PROBE, hidden)


def again(model: Any, folder: Path, like: Path) -> Any:
    """Save and load once more; the file holds the same tensors."""
    model.save_pretrained(folder, max_shard_size="30KB")
    before, after = Source.open(like), Source.open(folder)
    assert set(before.entries) == set(after.entries)
    packed_names = set(PackedSource.open_packed(like).packed)
    for name in packed_names:
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    return load(folder)


# --- what a recipe can leave behind

MIXES: dict[str, tuple[str, Steps]] = {
    "mixtral, experts only": ("mixtral", several(rtn("*.experts.*"))),
    "gpt_oss, experts only": ("gpt_oss", several(rtn("*.experts.*"))),
    "qwen3_moe, experts only": ("qwen3_moe", several(rtn("*.experts.*"))),
    "mixtral, bits by expert": (
        "mixtral",
        several(rtn("*.experts.0.*", 2), rtn("*.experts.[12].*", 3), rtn("*", 5, symmetric=False)),
    ),
    "gpt_oss, bits by expert": (
        "gpt_oss",
        several(rtn("*.experts.0.*", 2), rtn("*.experts.3.down_proj", 7), rtn("*.experts.*", 3)),
    ),
    "mixtral, some experts dense": ("mixtral", several(rtn(["*.experts.1.*", "*.experts.3.w2"]))),
    "deepseek_v3, some experts dense": ("deepseek_v3", several(rtn(["*.experts.0.gate_proj", "*.q_a_proj"], 3))),
    "mixtral, experts of one block": ("mixtral", several(rtn("model.layers.1.*.experts.*"))),
    "olmoe, experts of one block": ("olmoe", several(rtn("model.layers.2.*.experts.*"))),
    "gpt_oss, experts of one block": ("gpt_oss", several(rtn("model.layers.1.*.experts.*"))),
    "gpt_oss, outputs of experts": ("gpt_oss", several(rtn("*.experts.*.down_proj"))),
    "mixtral, outputs of experts": ("mixtral", several(rtn("*.experts.*.w2"))),
    "qwen2_moe, shared expert only": ("qwen2_moe", several(rtn("*.shared_expert.*"))),
    "llama, head only": ("llama", several(rtn("lm_head"))),
    "llama, one linear": ("llama", several(rtn("model.layers.1.mlp.up_proj"))),
    "gpt2, one block": ("gpt2", several(rtn("transformer.h.1.*"))),
    "phi3, per row": ("phi3", several(rtn("*.mlp.*", 3, group_size=-1), rtn("*"))),
}


@pytest.fixture(scope="module")
def mixes(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint per entry of MIXES."""
    root = tmp_path_factory.mktemp("mixes")
    found = {}
    for number, (name, (family, recipe)) in enumerate(MIXES.items()):
        found[name] = root / str(number)
        run(tiny(family), found[name], None, recipe)
    return found


@pytest.mark.parametrize("name", MIXES)
def test_any_mix_loads_and_saves_as_it_was(name: str, mixes: dict[str, Path], tmp_path: Path) -> None:
    folder = mixes[name]
    model = load(folder)
    expected = streamed(folder)
    torch.testing.assert_close(logits(model), expected, rtol=TOLERANCE, atol=TOLERANCE)
    table = site_table.read_table(json.loads((folder / "config.json").read_text())["quantization_config"])
    assert sum(isinstance(module, CompressedLinear) for module in model.modules()) == len(table)
    assert torch.equal(logits(again(model, tmp_path / "again", folder)), logits(model))


def test_experts_have_the_bits_of_their_step(mixes: dict[str, Path]) -> None:
    model = load(mixes["mixtral, bits by expert"])
    for block in model.model.layers:
        found = [block.mlp.experts.get_submodule(f"{n}.{w}").spec["base"]["bits"] for n in range(4) for w in ("w1", "w2", "w3")]
        assert found == [2] * 3 + [3] * 6 + [5] * 3
        assert block.self_attn.q_proj.spec["base"] == {"format": "bitpack", "bits": 5, "group_size": 16, "zero": True}


def test_without_the_package_every_mix_fails_loudly(mixes: dict[str, Path], tmp_path: Path) -> None:
    """Random weights in place of packed ones would only show in what the model says; also for what save_pretrained wrote."""
    folders = dict(mixes)
    for name in ("mixtral, experts only", "gpt_oss, experts only", "llama, head only"):
        folders[f"{name}, saved again"] = tmp_path / name
        load(mixes[name]).save_pretrained(tmp_path / name)
    code = """
    import json, sys
    from transformers import AutoModelForCausalLM, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcome = {}
    for name, folder in json.loads(sys.argv[1]).items():
        try:
            AutoModelForCausalLM.from_pretrained(folder)
            outcome[name] = "loaded"
        except (OSError, RuntimeError, ValueError) as error:
            outcome[name] = f"failed: {error}"
    assert "compress" not in sys.modules
    print(json.dumps(outcome))
    """
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps({name: str(path) for name, path in folders.items()})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, what in outcome.items() if what == "loaded"] == []
    assert len(outcome) == len(MIXES) + 3


# --- options of from_pretrained


@pytest.fixture(scope="module")
def llama(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llama") / "out"
    run(tiny("llama"), out, ids, steps(bits=4, group_size=32))
    return out


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"use_safetensors": True}])
def test_options_of_from_pretrained(options: dict[str, Any], llama: Path) -> None:
    if "device_map" in options:
        pytest.importorskip("accelerate")  # which transformers wants for it, and compress for nothing
    assert torch.equal(logits(load(llama, **options)), logits(load(llama)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, "auto"])
def test_dtypes(dtype: torch.dtype | str, llama: Path) -> None:
    model = load(llama, dtype=dtype)
    wanted = torch.float32 if isinstance(dtype, str) else dtype  # the tiny models are stored in float32
    assert model.dtype == wanted
    linear = model.model.layers[0].mlp.up_proj
    assert (linear.codes.dtype, linear.scale.dtype) == (torch.int32, torch.bfloat16)
    y, reference = logits(model).double(), logits(load(llama)).double()
    eps = max(torch.finfo(wanted).eps, torch.finfo(torch.float32).eps)
    assert (y - reference).norm() < 10 * eps * reference.norm()
    model.to(torch.bfloat16)
    assert (linear.codes.dtype, linear.scale.dtype) == (torch.int32, torch.bfloat16)
    assert torch.equal(linear.scale, load(llama).model.layers[0].mlp.up_proj.scale)


def test_generation_in_bfloat16_runs_on_the_int4_kernel(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = load(llama, dtype=torch.bfloat16), load(llama)
    calls = []
    real = int4_cpu.matmul
    monkeypatch.setattr(int4_cpu, "matmul", lambda *arguments: calls.append(1) or real(*arguments))
    prompt = PROBE[:1, :5]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert text.shape == (1, 11)
    assert len(calls) == 7 * 3 * 6, "seven linears in three blocks, for six tokens"
    calls.clear()
    assert reference.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).shape == (1, 11)
    assert not calls, "float32 stays exact"


def test_load_is_from_pretrained(llama: Path) -> None:
    assert torch.equal(logits(compress.load(str(llama), dtype=torch.float32)), logits(load(llama)))


# --- what does not fit


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose `quantization_config` was changed."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_newer_format_says_what_to_do(llama: Path, tmp_path: Path) -> None:
    folder = edited(llama, tmp_path / "newer", lambda q: q.update(format_version=2))
    with pytest.raises(FormatError, match=r"format_version is 2; this compress reads up to 1: upgrade it"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("llama, one linear", "model.layers.9.mlp.up_proj", "the model has no such module"),
        ("llama, one linear", "model.layers.1.mlp.side_proj", "the model has no such module"),
        ("llama, one linear", "model.layers.1.mlp", "it is a LlamaMLP, not a linear"),
        ("llama, one linear", "model.embed_tokens", "it is a Embedding, not a linear"),
        ("llama, one linear", "model.norm", "not a linear"),
        (
            "llama, one linear",
            "model.layers.0.mlp.down_proj",
            r"shape \[64, 32\] in quantization_config; the model has \[32, 64\]",
        ),
        ("mixtral, experts only", "model.layers.1.block_sparse_moe.experts.4.w1", "the model has no such module"),
        ("mixtral, experts only", "model.layers.1.block_sparse_moe.experts.0.w9", "the model has no such module"),
        ("mixtral, experts only", "model.layers.7.block_sparse_moe.experts.0.w1", "the model has no such module"),
        ("gpt_oss, experts only", "model.layers.0.self_attn.experts.0.down_proj", "the model has no such module"),
    ],
)
def test_a_site_that_the_model_does_not_have(name: str, site: str, message: str, mixes: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(mixes[name], tmp_path / "edited", lambda q: q["sites"].update({site: 0}))
    with pytest.raises(FormatError, match=message):
        load(folder)


def test_an_expert_of_another_shape(mixes: dict[str, Path], tmp_path: Path) -> None:
    def swap(q: dict[str, Any]) -> None:
        q["sites"] = {pattern: len(q["specs"]) - 1 - number for pattern, number in q["sites"].items()}

    folder = edited(mixes["mixtral, experts only"], tmp_path / "edited", swap)
    with pytest.raises(FormatError, match=r"expert 0 w\d: shape .* in quantization_config; the model has"):
        load(folder)


def test_a_guard_that_is_not_compressed(mixes: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(mixes["llama, one linear"], tmp_path / "edited", lambda q: q.update(guard="model.norm.weight"))
    with pytest.raises(FormatError, match="guard"):
        load(folder)


def test_a_missing_packed_tensor_is_loud(llama: Path, tmp_path: Path) -> None:
    """Left to itself, transformers warns and goes on with whatever the memory holds."""
    shutil.copytree(llama, tmp_path / "gap")
    tensors = load_file(tmp_path / "gap" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scale"]
    save_file(tensors, tmp_path / "gap" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj.scale is missing"):
        PackedSource.open_packed(tmp_path / "gap")
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj.scale: named in quantization_config, but no file has it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "gap")


def test_more_blocks_than_files_have(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "more")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "more" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(FormatError, match=r"config\.json: has 5 blocks, and no file has a tensor of block 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "more")


def damaged(folder: Path, target: Path, leaf: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Copy a checkpoint and change one packed tensor, in place or by another; return the site that it is of."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(f".{leaf}") and len(tensors[name]) > 1)
    other = change(tensors[name])
    tensors[name] = tensors[name] if other is None else other
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return name.removesuffix(f".{leaf}")


@pytest.fixture(scope="module")
def outliers(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("outliers") / "out"
    run(
        tiny("llama"),
        out,
        ids,
        [{"match": "*.1.mlp.*", "method": "quant/spqr", "options": {"bits": 3, "outlier_threshold": 0.1}}],
    )
    return out


def put(index: Any, value: float) -> Callable[[torch.Tensor], None]:
    def change(tensor: torch.Tensor) -> None:
        tensor[index] = value

    return change


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("outliers_pointers", put(1, 2**31 - 1), "pointers do not rise"),
        ("outliers_pointers", put(-1, 10**6), "pointers do not rise"),
        ("outliers_pointers", put(0, -5), "pointers do not rise"),
        ("outliers_columns", put(0, 200), "names a column outside"),
        ("outliers_values", put(0, float("nan")), "outliers_values: 1 of"),
        ("scale_top", put((0, 0), float("inf")), "scale_top: 1 of"),
        ("codes", lambda codes: codes.view(torch.float32), r"is F32 \[\d+\] in model.safetensors; .* says I32"),
        ("codes", lambda codes: codes[:-1].clone(), "quantization_config says I32"),
    ],
)
def test_what_a_kernel_would_follow_is_looked_at_when_it_is_loaded(
    leaf: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str, outliers: Path, tmp_path: Path
) -> None:
    """On whatever device, and before any product: kernels read what pointers and columns name."""
    site = damaged(outliers, tmp_path / "out", leaf, change)
    with pytest.raises((FormatError, CheckpointError), match=message) as found:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert site in str(found.value)


# --- every family at once, and memory


@pytest.mark.parametrize("family", some(TINY, "llama", "gemma3", "deepseek_v3"))
def test_nothing_is_missing_or_left_over(family: str, tiny: Tiny, tmp_path: Path) -> None:
    run(tiny(family), tmp_path / "out", None, [rtn(bits=3)])
    load(tmp_path / "out")


def large_checkpoint(folder: Path) -> int:
    """Write a compressed llama with random codes: 4 bits, 101 million weights in its linears. Return the bytes of its file."""
    config = tiny_config(
        "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8
    )
    config.save_pretrained(folder)
    shapes = {f"self_attn.{name}_proj": (1024, 1024) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024), "mlp.down_proj": (1024, 4096)}
    leaves = {name: packing.pack(random_weight(*shape, group_size=128)) for name, shape in shapes.items()}
    tensors, specs = {}, {}
    for block in range(6):
        for name, (mine, spec) in leaves.items():
            site = f"model.layers.{block}.{name}"
            specs[site] = spec
            tensors |= {f"{site}.{leaf}": tensor for leaf, tensor in mine.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(1024)
    guard = "model.layers.0.self_attn.q_proj.weight"
    tensors |= {"model.norm.weight": torch.ones(1024), guard: torch.empty(0, dtype=torch.bfloat16)}
    tensors |= {name: torch.randn(VOCABULARY, 1024) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save(folder / "model.safetensors", tensors)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": site_table.write_table(specs, guard)}))
    return (folder / "model.safetensors").stat().st_size


def test_no_dense_copy_while_loading(tmp_path: Path, llama: Path) -> None:
    """In a process of its own: peak memory over what a small model needs, against the file.

    The file is mapped while its tensors are copied out of it, so up to twice its size is resident for a moment. The linears alone
    would have four times its size in bfloat16.
    """
    size = large_checkpoint(tmp_path)
    assert size > 50_000_000
    code = """
    import resource, sys
    import compress, torch
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    before = peak()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
    loaded = peak() - before
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    print(loaded)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(llama), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.2 * size
