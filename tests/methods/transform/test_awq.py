"""AWQ: the search against loops over rows, groups and tokens in float64; special inputs; whole runs."""

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
from tiny import VOCABULARY
from torch import Tensor

from compress.blockwise.forward import last_hidden
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.methods.block import Scalable
from compress.methods.quant.gptq import GPTQ
from compress.methods.quant.rtn import RTN
from compress.methods.transform import awq
from compress.methods.transform.awq import AWQ, Rounding, candidates, clip, losses
from compress.report.rows import read_rows
from compress.run.pipeline import Settings

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
TRANSFORM = {"transforms": [{"method": "transform/awq"}]}
RTN3 = steps("quant/rtn", bits=3, group_size=16)


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns, dtype=torch.float64) + 0.3 * torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    size = torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix * size


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.05


def to_bfloat16(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).bfloat16())


def round_group(group: list[float], bits: int, symmetric: bool) -> list[float]:
    """Plain rounding of one group on its min-max grid, number by number."""
    top = 2**bits - 1
    low, high = min(*group, 0.0), max(*group, 0.0)
    if symmetric:
        scale, zero = to_bfloat16(max(-low, high) * 2 / top), float(2 ** (bits - 1))
    else:
        scale = to_bfloat16((high - low) / top)
        zero = min(max(float(round(-low / scale)), 0.0), float(top))
    return [(min(max(float(round(w / scale)) + zero, 0.0), float(top)) - zero) * scale for w in group]


def round_rows(weight: list[list[float]], bits: int, size: int, symmetric: bool) -> list[list[float]]:
    return [
        [q for start in range(0, len(row), size) for q in round_group(row[start : start + size], bits, symmetric)]
        for row in weight
    ]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(3, 8), (2, 24), (4, 12)])
def test_losses_are_the_output_errors_of_rounded_scaled_weights(bits: int, size: int, symmetric: bool) -> None:
    weight, rows = weights(5, 24), inputs(40, 24)
    scales = candidates(rows.abs().mean(0), torch.ones(24, dtype=torch.bool), 6)
    found = losses(weight, rows.T @ rows / 40, scales, Rounding(bits, size, symmetric, "minmax"))
    for scale, loss in zip(scales.tolist(), found.tolist(), strict=True):
        scaled = [[w * s for w, s in zip(row, scale, strict=True)] for row in weight.tolist()]
        rounded = round_rows(scaled, bits, size, symmetric)
        expected = 0.0
        for x in rows.tolist():
            for w, q in zip(weight.tolist(), rounded, strict=True):
                expected += sum((a - b / s) * v for a, b, s, v in zip(w, q, scale, x, strict=True)) ** 2
        assert loss == pytest.approx(expected / 40, rel=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_takes_the_bound_of_least_error_of_each_group(symmetric: bool) -> None:
    weight, rows = weights(6, 24), inputs(40, 24)
    weight[0, 3], weight[4, 20] = 0.6, -0.5
    found = clip(weight, rows.T @ rows / 40, Rounding(2, 8, symmetric, "minmax"), 20)
    moved = 0
    for r in range(6):
        for start in range(0, 24, 8):
            group, x = weight[r, start : start + 8].tolist(), rows[:, start : start + 8].tolist()
            top, best, bound = max(map(abs, group)), float("inf"), 0.0
            for step in range(10):
                limit = top * (1 - step / 20)
                rounded = round_group([min(max(w, -limit), limit) for w in group], 2, symmetric)
                error = sum(sum((a - b) * v for a, b, v in zip(group, rounded, token, strict=True)) ** 2 for token in x)
                if error < best - 1e-12 * abs(error):
                    best, bound = error, limit
            expected = [min(max(w, -bound), bound) for w in group]
            assert found[r, start : start + 8].tolist() == pytest.approx(expected, rel=1e-9)
            moved += bound < top
    assert moved > 3


def test_candidates_are_powers_of_the_magnitudes_around_one() -> None:
    magnitude = torch.tensor([4.0, 1.0, 0.25, 0.0, 7.0], dtype=torch.float64)
    read = torch.tensor([True, True, True, True, False])
    found = candidates(magnitude, read, 4)
    assert torch.equal(found[0], torch.ones(5, dtype=torch.float64))
    for number, row in enumerate(found.tolist()):
        raw = [max(a, 4e-4) ** (number / 4) for a in (4.0, 1.0, 0.25, 0.0)]
        middle = (max(raw) * min(raw)) ** 0.5
        assert row == pytest.approx([*(r / middle for r in raw), 1.0])
    assert torch.equal(candidates(torch.zeros(5), read, 4), torch.ones(4, 5))
    # The unit of the inputs does not matter.
    torch.testing.assert_close(candidates(magnitude * 1e-12, read, 4), found)


def test_one_loud_channel_is_worth_a_scale() -> None:
    rows = inputs(200, 32)
    rows[:, 5] *= 100
    scales = candidates(rows.abs().mean(0), torch.ones(32, dtype=torch.bool), 20)
    found = losses(weights(16, 32), rows.T @ rows / 200, scales, Rounding(3, 32, True, "minmax"))
    assert float(found.min()) < 0.7 * float(found[0])
    assert int(found.argmin()) > 0


def test_the_grid_is_that_of_the_method_that_rounds_unless_told() -> None:
    rounding = RTN(bits=3, group_size=16, symmetric=False, range="minmax")
    assert AWQ().grid(rounding) == Rounding(3, 16, False, "minmax")
    assert AWQ(bits=2, symmetric=True, group_size=-1, range="mse").grid(rounding) == Rounding(2, -1, True, "mse")


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


PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_run_reloads_with_the_logits_of_its_file(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from compress.verify.verify import verify

    out = tmp_path / "out"
    summary = run(tiny(family), out, ids, RTN3, **TRANSFORM).values
    skeleton, hidden = last_hidden(PackedSource.open_packed(out), PROBE, torch.float32, CPU)
    with skeleton.outer():
        streamed = skeleton.logits(PROBE, hidden)
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


def test_nothing_is_known_of_an_inferred_family_and_the_note_says_so(
    tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from compress.architecture.families import llama

    monkeypatch.setattr(llama, "FAMILIES", ())
    run(tiny("llama"), tmp_path / "out", ids, RTN3, transforms=[{"method": "transform/awq", "options": {"clip": False}}])
    assert {note["scales"] for note in notes(tmp_path / "out").values()} == {"what produces its input can take none"}


def test_passes_give_the_bytes_of_one_pass(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    run(tiny("mixtral"), tmp_path / "one", ids, RTN3, **TRANSFORM)
    run(tiny("mixtral"), tmp_path / "many", ids, RTN3, settings=Settings(memory=1), **TRANSFORM)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


@pytest.mark.parametrize("more", [{}, {"settings": Settings(offload=True)}, {"settings": Settings(snapshot_seconds=0.0)}])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(more: dict[str, Any], tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def listen(block: int, blocks: int, step: str, share: float) -> None:
        if block == 2:
            raise Stop

    recipe = {**TRANSFORM, **more}
    gptq = steps(bits=3, group_size=16)
    run(tiny("mixtral"), tmp_path / "whole", ids, gptq, **recipe)
    with pytest.raises(Stop):
        run(tiny("mixtral"), tmp_path / "out", ids, gptq, listen=listen, **recipe)
    run(tiny("mixtral"), tmp_path / "out", ids, gptq, **recipe)
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
    from compress.commands._shared import method_line

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


class Few:
    """A block of three linears: a norm feeds a and, with a third of the tokens, b; rows of b feed c, two columns each."""

    def __init__(self) -> None:
        self.sites = {"a": (6, 16), "b": (8, 16), "c": (5, 16)}
        self.weights = {name: weights(*shape, seed=n).float() for n, (name, shape) in enumerate(self.sites.items())}
        rows = inputs(60, 16).float()
        self.rows = {"a": rows, "b": rows[::3] * 1.5, "c": inputs(50, 16, 5).float()}
        self.norm = torch.linspace(0.3, 2.0, 16)
        self.scalables = [
            Scalable("norm", ("a", "b"), copied=("router",)),
            Scalable("b", ("c",), norm=False, bias="bias", channels=torch.arange(16) // 2),
        ]

    def rounding(self, site: str) -> RTN:
        return RTN(bits=2 if site == "c" else 3, group_size=8, range="minmax")

    def weight(self, site: str) -> Tensor:
        return self.weights[site].clone()

    def others(self) -> dict[str, Tensor]:
        return {"norm": self.norm.clone(), "router": torch.ones(2, 16), "bias": torch.ones(8)}

    def stored(self, name: str, value: Tensor) -> Tensor:
        return value.float()

    def observe_in_turn(self, kinds: Any) -> Any:
        for name, rows in self.rows.items():
            stats = {kind: kind(16, CPU) for kind in kinds}
            for statistic in stats.values():
                statistic.add(rows)
            yield (name,), stats

    def observe(self, kinds: Any) -> Any:
        return {names[0]: stats for names, stats in self.observe_in_turn(kinds)}


def best_scale(block: Few, names: list[str], magnitude: list[float], columns: list[int]) -> tuple[int, list[float], float]:
    """The number of the best candidate of eight, its scales per channel and its error over that of none, by sums over tokens."""
    results = []
    for number in range(8):
        raw = [max(a, 1e-4 * max(magnitude)) ** (number / 8) for a in magnitude]
        scale = [r / (max(raw) * min(raw)) ** 0.5 for r in raw]
        spread = [scale[c] for c in columns]
        error = 0.0
        for name in names:
            weight = block.weights[name].double()
            bits = block.rounding(name).bits
            scaled = [[w * s for w, s in zip(row, spread, strict=True)] for row in weight.tolist()]
            rounded = torch.tensor(round_rows(scaled, bits, 8, True), dtype=torch.float64) / torch.tensor(spread).double()
            error += float(((weight - rounded) @ block.rows[name].double().T).square().sum())
        results.append((error, number, scale))
    error, number, scale = min(results)
    return number, scale, error / results[0][0]


def test_a_block_is_searched_as_sums_over_its_tokens_say() -> None:
    block = Few()
    changed = AWQ(points=8, clip=False)(block)  # type: ignore[arg-type]
    tokens = torch.cat([block.rows["a"], block.rows["b"]]).double().abs().mean(0).tolist()
    first, outer, gain = best_scale(block, ["a", "b"], tokens, list(range(16)))
    heard = block.rows["c"].double().abs().mean(0).view(8, 2).amax(1).tolist()
    second, inner, more = best_scale(block, ["c"], heard, [c // 2 for c in range(16)])
    assert first > 0
    assert second > 0
    assert [changed.notes[name]["alpha"] for name in "abc"] == [first / 8, first / 8, second / 8]
    found = [changed.notes[name]["loss"] for name in "abc"]
    assert found == pytest.approx([gain, gain, more], abs=1e-4)
    outer_, inner_ = torch.tensor(outer), torch.tensor(inner)
    torch.testing.assert_close(changed.others["norm"], block.norm / outer_, rtol=1e-5, atol=0)
    torch.testing.assert_close(changed.others["router"], outer_.expand(2, 16), rtol=1e-5, atol=0)
    torch.testing.assert_close(changed.others["bias"], 1 / inner_, rtol=1e-5, atol=0)
    torch.testing.assert_close(changed.weights["a"], block.weights["a"] * outer_, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(changed.weights["b"], block.weights["b"] * outer_ / inner_.unsqueeze(1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(changed.weights["c"], block.weights["c"] * inner_.repeat_interleave(2), rtol=1e-5, atol=1e-8)
    other = Few()
    other.scalables.reverse()  # rows of b are divided before its columns are multiplied
    again = AWQ(points=8, clip=False)(other)  # type: ignore[arg-type]
    torch.testing.assert_close(again.weights["b"], changed.weights["b"])


def test_clipping_follows_scaling_and_sees_the_scaled_inputs() -> None:
    block = Few()
    scaled = AWQ(points=8, clip=False)(block)  # type: ignore[arg-type]
    both = AWQ(points=8, clip_skip=("a",))(block)  # type: ignore[arg-type]
    assert torch.equal(both.weights["a"], scaled.weights["a"])
    clipped = 0
    for name in "bc":
        spread = scaled.weights[name] / block.weights[name] if name == "c" else scaled.weights["a"] / block.weights["a"]
        rows = block.rows[name] / spread[0]
        expected = clip(scaled.weights[name], rows.T @ rows, Rounding(block.rounding(name).bits, 8, True, "minmax"), 20)
        torch.testing.assert_close(both.weights[name], expected, rtol=1e-4, atol=1e-7)
        clipped += int((both.weights[name] != scaled.weights[name]).sum())
    assert clipped > 0
    block.rounding = lambda site: GPTQ(bits=3, group_size=8)  # type: ignore[assignment,method-assign]
    assert not any("clipped" in note for note in AWQ()(block).notes.values())  # type: ignore[arg-type]
    alone = AWQ(scale=False, clip=True)(block)  # type: ignore[arg-type]
    assert set(alone.weights) == {"a", "b", "c"}
    assert alone.others == {}
