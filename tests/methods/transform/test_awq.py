"""AWQ: the search against loops over rows, groups and tokens in float64, and special inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.methods.block import Scalable
from compress.methods.quant.gptq import GPTQ
from compress.methods.quant.rtn import RTN
from compress.methods.transform.awq import AWQ, Rounding, candidates, clip, losses

CPU = torch.device("cpu")


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
