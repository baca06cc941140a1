"""One budget of sparsity over many weights: thresholds over all of them, outliers of blocks, measured costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compress, steps

from compress.checkpoint.packed_source import PackedSource
from compress.planning import sparsity as distribution
from compress.planning import sparsity_steps as shares
from compress.planning.sensitivity import sites_of
from compress.planning.sparsity import MOST, by_magnitude, by_outliers, outlier_share, spread, steps_of
from compress.recipe import assignment as recipe_assignment
from compress.recipe import reading as recipe_reading
from compress.report.rows import read_rows
from compress.runs import prepare as run_prepare


def plan_of(model: Path, data: Path | None = None, method: str = "prune/magnitude", match: str = "*.*") -> run_prepare.RunPlan:
    values: dict[str, Any] = {"steps": steps(method, match), "dtype": "float32", "batch_tokens": 64}
    if data is not None:
        values["data"] = {"name": str(data)}
    return run_prepare.prepare(str(model), recipe_reading.parse(values), "cpu")


def weights_of(plan: run_prepare.RunPlan) -> dict[str, torch.Tensor]:
    return {site.name: plan.source.tensor(site.tensor).float() for site in sites_of(plan)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.8])
def test_one_threshold_over_all_magnitudes(sparsity: float, tiny: Any) -> None:
    plan = plan_of(tiny("llama"))
    found, weights = by_magnitude(plan, sites_of(plan), sparsity), weights_of(plan)
    total = sum(w.numel() for w in weights.values())
    gone = {name: found[name] * w.numel() for name, w in weights.items()}
    assert all(count == pytest.approx(round(count)) for count in gone.values())
    assert sum(map(round, gone.values())) == round(sparsity * total)
    sorted_ = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values
    if sparsity > 0:
        threshold = float(sorted_[round(sparsity * total)])
        for name, w in weights.items():
            # bfloat16 has 8 bits of a magnitude: within the last bin counts are shared out.
            below = int((w.abs() < threshold * (1 - 2**-7)).sum()), int((w.abs() <= threshold * (1 + 2**-7)).sum())
            assert below[0] <= round(gone[name]) <= below[1]


def test_no_matrix_is_emptied_and_others_make_up_for_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny("llama"))
    sites, real = sites_of(plan), distribution._histogram
    small = sites[0].name
    weight = plan.source.tensor(sites[0].tensor).float()

    def histogram(value: torch.Tensor) -> torch.Tensor:
        return real(value * 1e-6 if torch.equal(value.float(), weight) else value)

    monkeypatch.setattr(distribution, "_histogram", histogram)
    for sparsity in (0.5, 0.94):
        found = by_magnitude(plan, sites, sparsity)
        assert found[small] == int(MOST * sites[0].numel) / sites[0].numel
        assert sum(round(found[s.name] * s.numel) for s in sites) == round(sparsity * sum(s.numel for s in sites))
    full = by_magnitude(plan, sites, 0.99)
    assert all(full[s.name] == int(MOST * s.numel) / s.numel for s in sites)


def test_outliers_of_a_block_by_their_definition() -> None:
    scores = [torch.tensor([[1.0, 1.0], [1.0, 60.0]]), torch.tensor([[1.0, 2.0, 1.0, 1.0]])]
    assert outlier_share(scores) == 1 / 8
    assert outlier_share([torch.ones(3, 3)]) == 0.0


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.7, 0.93])
def test_more_outliers_are_denser_and_the_mean_is_as_asked(sparsity: float) -> None:
    shares_, sizes = {0: 0.01, 1: 0.05, 2: 0.03, 3: 0.01}, {0: 100, 1: 300, 2: 100, 3: 200}
    found = spread(shares_, sizes, sparsity)
    assert found[1] < found[2] <= found[0] == found[3]
    assert sum(found[b] * sizes[b] for b in sizes) / 700 == pytest.approx(sparsity, abs=1e-5)
    if sparsity < 0.8:  # nothing is cut off: the equation of the paper, with the mean over weights
        density = {b: 0.16 * (share - 0.01) / 0.04 for b, share in shares_.items()}
        mean = sum(density[b] * sizes[b] for b in sizes) / 700
        assert all(1 - found[b] == pytest.approx(density[b] - mean + 1 - sparsity, abs=1e-5) for b in sizes)
    else:
        assert max(found.values()) <= MOST
    assert set(spread(dict.fromkeys(range(3), 0.02), {0: 1, 1: 2, 2: 3}, 0.4).values()) == {0.4}


def test_outliers_are_those_of_the_inputs_that_a_block_sees(tiny: Any, ids: Path) -> None:
    plan = plan_of(tiny("mixtral"), ids, "prune/wanda")
    tokens = run_prepare.calibration(plan)
    found, outliers = by_outliers(plan, sites_of(plan), tokens, 0.6, 1 << 30, lambda *_: None)
    again, _ = by_outliers(plan, sites_of(plan), tokens, 0.6, 1 << 12, lambda *_: None)  # several passes
    assert found == again
    assert len(outliers) == 3
    assert all(0 < share < 0.2 for share in outliers)
    by_block = {site.block: found[site.name] for site in sites_of(plan)}
    order = sorted(range(3), key=lambda b: outliers[b])
    assert by_block[order[0]] > by_block[order[1]] > by_block[order[2]]
    assert by_block[order[0]] - by_block[order[2]] == pytest.approx(0.16, abs=1e-5)


def test_steps_say_what_was_decided(tiny: Any) -> None:
    plan = plan_of(tiny("llama"), match="*.mlp.*")
    sites = sites_of(plan)
    others = [s.name for s in plan.inventory.sites if s.name not in {t.name for t in sites}]
    wanted = {site.name: 0.5 + 0.01 * (site.block or 0) for site in sites}
    made = steps_of(wanted, others, "prune/wanda", {"bits": 4, "group_size": 32})
    assert len(made) == 3
    parsed = recipe_reading.parse({"steps": made})
    assignments = recipe_assignment.resolve(parsed, plan.inventory.sites)
    assert {a.site.name: a.method.sparsity for a in assignments} == wanted
    assert all(a.method.bits == 4 for a in assignments)


@pytest.mark.parametrize("distribute", ["global", "owl", "measured"])
def test_a_run_has_the_sparsity_that_was_asked_for(distribute: str, tiny: Any, ids: Path, tmp_path: Path) -> None:
    method = "prune/magnitude" if distribute == "global" else "prune/wanda"
    values = {"data": {"name": str(ids)}, "dtype": "float32", "batch_tokens": 64, "steps": steps(method, within="matrix")}
    made = shares.steps(str(tiny("llama")), values, distribute, 0.6, tmp_path, "cpu", None, 1 << 30, lambda *_: None)
    compress(tiny("llama"), tmp_path / "out", ids, made)
    rows = read_rows(tmp_path / "out" / "report.jsonl")
    total = sum(row.numel for row in rows)
    gone = sum(row.notes["sparsity"] * row.numel for row in rows)
    # A row of a small matrix is a coarse unit; a measured plan fills its budget as well as steps of 10 % allow.
    assert gone / total == pytest.approx(0.6, abs=1 / total if distribute == "global" else 0.01 if distribute == "owl" else 0.02)
    assert len({round(row.notes["sparsity"], 3) for row in rows}) > 1
    if distribute == "global":
        source = PackedSource.open_packed(tmp_path / "out")
        kept = [source.compressed(row.site) for row in rows]
        weakest = min(float(w.dequantize()[w.keep.mask()].abs().min()) for w in kept if w.keep is not None)
        original = weights_of(plan_of(tiny("llama")))
        strongest = max(float(original[r.site][~w.keep.mask()].abs().max()) for r, w in zip(rows, kept, strict=True) if w.keep)
        assert strongest <= weakest * (1 + 2**-7)
