"""Drift correction: against least squares over tokens in float64, experts' tokens in pairs, special inputs, whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from torch import Tensor, nn

from compress.blockwise.forward import last_hidden
from compress.calibration.observe import Tap, observe_drift
from compress.calibration.statistics import Drift
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CalibrationError
from compress.methods.transform import drift as drift_module
from compress.methods.transform.drift import DriftCorrection
from compress.report.rows import read_rows
from compress.runs.pipeline import Settings

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
STAGE = {"transforms": [{"method": "transform/drift"}]}


class OneTap:
    """A block of two linears that read one tensor."""

    def __init__(self, drift: Drift, weights: dict[str, Tensor]) -> None:
        self.drift, self.weights = drift, weights

    def drift_in_turn(self) -> Iterator[tuple[tuple[str, ...], Drift]]:
        yield tuple(self.weights), self.drift

    def weight(self, site: str) -> Tensor:
        return self.weights[site]


def pairs(tokens: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs behind compressed blocks, and the original's."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return original + 0.3 * torch.randn(tokens, columns, generator=generator) - 0.1 * original.roll(1, 1), original


def corrected(rows: Tensor, original: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    drift = Drift(rows.shape[1], CPU)
    for part, other in zip(rows.split(7), original.split(7), strict=True):
        drift.add_pair(part, other)
    changed = DriftCorrection(**options)(OneTap(drift, {"a": weight[:2], "b": weight[2:]}))
    return torch.cat([changed.weights.get("a", weight[:2]), changed.weights.get("b", weight[2:])]), changed.notes


def test_it_is_the_ridge_regression_of_the_originals_outputs_on_the_inputs_that_there_are() -> None:
    """Row by row and from the tokens themselves: W* minimises sum |W y - Q x|^2 + damp n mean(diag H) |W - Q|^2 in float64."""
    tokens, columns, damp = 90, 12, 0.01
    rows, original = pairs(tokens, columns)
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    x, y, w = (t.double().numpy() for t in (rows, original, weight))
    ridge = np.sqrt(damp * sum(float(v @ v) for v in x) / columns)
    # What is regressed is the difference that W leaves, with a ridge on the step from W.
    stacked = np.vstack([x, ridge * np.eye(columns)])
    share = 0.75 * tokens / (tokens + columns)
    expected = []
    for row in w:
        target = np.concatenate([(y - x) @ row, np.zeros(columns)])
        expected.append(row + share * np.linalg.lstsq(stacked, target, rcond=None)[0])
    found, notes = corrected(rows, original, weight, share=0.75, damp=damp)
    torch.testing.assert_close(found.double(), torch.tensor(np.array(expected)), rtol=1e-5, atol=1e-6)
    step = found[:2].double() - weight[:2].double()
    second = rows.double().T @ rows.double()
    before = weight[:2].double()
    moved = float(((step @ second) * step).sum() / ((before @ second) * before).sum())
    assert notes["a"]["moved"] == pytest.approx(moved, rel=1e-4)


def test_all_of_the_drift_brings_outputs_nearer_to_the_originals() -> None:
    rows, original = pairs(400, 10)
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    errors = [(original @ weight.T - rows @ weight.T).square().sum()]
    for share in (0.5, 1.0):
        found, _ = corrected(rows, original, weight, share=share)
        errors.append((original @ weight.T - rows @ found.T).square().sum())
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("case", ["no drift", "no tokens", "dead column", "constant", "one token"])
def test_special_inputs(case: str) -> None:
    rows, original = pairs(1 if case == "one token" else 60, 8)
    if case == "no drift":
        rows = original
    if case == "no tokens":
        rows, original = rows[:0], original[:0]
    if case == "dead column":
        rows[:, 3] = original[:, 3] = 0
    if case == "constant":
        rows, original = torch.ones_like(rows), torch.ones_like(rows) * 1.5
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    found, notes = corrected(rows, original, weight)
    assert bool(found.isfinite().all())
    assert torch.equal(found, weight) == (case in ("no drift", "no tokens"))
    assert (notes["a"]["moved"] == 0) == (case in ("no drift", "no tokens"))
    if case == "dead column":
        assert torch.equal(found[:, 3], weight[:, 3])


class Routed(nn.Module):
    """Two experts; tokens go where the sign of their first value says."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            mine = (index == number).any(1)
            if bool(mine.any()):
                output[mine] = expert(hidden[mine]) * weights[mine]
        return output


def test_experts_see_the_same_tokens_in_both_passes() -> None:
    torch.manual_seed(0)
    routed = Routed()
    batches = [(torch.randn(6, 4), torch.randn(6, 4)) for _ in range(3)]

    def both() -> Iterator[bool]:
        for rows, original in batches:
            for second, hidden in ((False, rows), (True, original)):
                yield second
                routed(hidden, index=(hidden[:, :1] > 0).long(), weights=hidden[:, 1:2])

    taps = [Tap(str(n), (expert,), 4, (Drift,)) for n, expert in enumerate(routed.experts)]
    with torch.no_grad():
        found = observe_drift(taps, [routed], both, CPU)
    for number in range(2):
        mine = [((rows[:, 0] > 0) == bool(number), rows, original) for rows, original in batches]
        cross = sum((y[m] - x[m]).T @ x[m] for m, x, y in mine)
        torch.testing.assert_close(found[str(number)].cross.float(), cross)
        assert found[str(number)].tokens == sum(int(m.sum()) for m, _, _ in mine)
    assert not routed._forward_pre_hooks


def test_drifts_add_up() -> None:
    rows, original = pairs(40, 6)
    whole, first, second = (Drift(6, CPU) for _ in range(3))
    whole.add_pair(rows, original)
    first.add_pair(rows[:13], original[:13])
    second.add_pair(rows[13:], original[13:])
    first.merge(second)
    assert first.tokens == whole.tokens == 40
    for mine, theirs in zip(first.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    still = Drift(6, CPU)
    still.add(rows)
    assert not still.cross.any()
    assert still.second.any()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_hidden_states_end_nearer_to_the_originals(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """On text that was not calibrated on; the first block has nothing to correct."""
    generator = np.random.default_rng(0)
    data = tmp_path / "ids.npy"
    np.save(data, generator.integers(0, VOCABULARY, (48, 32), dtype=np.int32))
    probe = torch.from_numpy(generator.integers(0, VOCABULARY, (16, 32)))
    two_bits = steps(bits=2, group_size=32)
    run(tiny(family), tmp_path / "plain", data, two_bits)
    run(tiny(family), tmp_path / "corrected", data, two_bits, **STAGE)
    rows = {r.site: r.notes["transform/drift"]["moved"] for r in read_rows(tmp_path / "corrected" / "report.jsonl")}
    assert all(
        (moved == 0) == ("layers.0." in site) for site, moved in rows.items() if "expert" not in site and "o_proj" not in site
    )

    def states(source: Source) -> Tensor:
        return last_hidden(source, probe, torch.float32, CPU)[1]

    original = states(Source.open(tiny(family)))
    errors = [
        float((states(PackedSource.open_packed(tmp_path / name)) - original).square().mean()) for name in ("plain", "corrected")
    ]
    assert errors[1] < errors[0]


def test_memory_disk_and_stops_change_nothing(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if block == 2:
            raise Stop

    gptq = steps(bits=3, group_size=16)
    run(tiny("mixtral"), tmp_path / "whole", ids, gptq, **STAGE)
    run(tiny("mixtral"), tmp_path / "disk", ids, gptq, settings=Settings(offload=True, memory=1), **STAGE)
    with pytest.raises(Stop):
        run(tiny("mixtral"), tmp_path / "stopped", ids, gptq, progress=progress, **STAGE)
    run(tiny("mixtral"), tmp_path / "stopped", ids, gptq, **STAGE)
    assert digests(tmp_path / "whole") == digests(tmp_path / "disk") == digests(tmp_path / "stopped")


def test_two_processes_correct_what_one_does(forks: Any, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    flags = ["--method", "drift+rtn", "--bits", "8", "--group-size", "16", "--data", ids, "--dtype", "float32", "-q"]
    two_ranks(
        forks,
        tmp_path,
        "quantize",
        tiny("llama"),
        "-o",
        tmp_path / "two",
        *flags,
        "--set",
        "batch_tokens=64",
        "-q",
        "--no-reload",
    )
    run(tiny("llama"), tmp_path / "one", ids, steps("quant/rtn", bits=8, group_size=16), **STAGE)
    one, two = (PackedSource.open_packed(tmp_path / name) for name in ("one", "two"))
    for site in one.table:
        # Sums of ranks differ in the last digits, which may tip a code of 8 bits to its neighbour.
        torch.testing.assert_close(two.compressed(site).dequantize(), one.compressed(site).dequantize(), atol=2e-3, rtol=0)


def test_what_cannot_be_corrected_is_said_in_the_report(
    tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_module, "correction", lambda *_: None)
    run(tiny("llama"), tmp_path / "out", ids, steps(bits=4, group_size=16), **STAGE)
    run(tiny("llama"), tmp_path / "plain", ids, steps(bits=4, group_size=16))
    for row in read_rows(tmp_path / "out" / "report.jsonl"):
        said = "transform/drift: as it was, the Hessian is not positive definite"
        assert row.fallback == (None if row.block == 0 else said)
    for name in ("out", "plain"):
        assert (tmp_path / name / "model.safetensors").exists()
    assert digests(tmp_path / "out")["model.safetensors"] == digests(tmp_path / "plain")["model.safetensors"]


def test_inputs_that_are_not_finite_are_an_error() -> None:
    rows, original = pairs(60, 8)
    rows[3, 2] = torch.inf
    with pytest.raises(CalibrationError, match="a: its inputs are not finite"):
        corrected(rows, original, torch.ones(4, 8))


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"damp": 0.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DriftCorrection(**options)
