"""The order of channels before N:M: what it keeps against loops and all partitions, no change of function, whole runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformed
from pydantic import ValidationError
from runs import compress as run
from runs import digests, steps
from thorough import some
from tiny import TINY
from torch import Tensor

from compress.architecture.inventory import take_inventory
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.methods.transform import permute
from compress.methods.transform.permute import (
    Permute,
    assigned,
    best_order,
    dealt,
    kept,
    parts_of,
    refined,
    refined_in_parts,
    reordered,
    turned,
)
from compress.model.detect import find_family
from compress.report.rows import read_rows

Tiny = Callable[..., Path]
STAGE = {"transforms": [{"method": "transform/permute"}]}
TWO_OF_FOUR = {"pattern": "2:4"}


def scores(rows: int, size: int, sets: int = 1, seed: int = 0) -> Tensor:
    """Scores whose columns differ in size, so that strong ones meet by chance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sets, rows, size, generator=generator) * torch.exp(torch.randn(sets, 1, size, generator=generator))


def kept_by_hand(score: Tensor, order: Any, count: int, of: int) -> float:
    """What N:M keeps of scores (rows, size), number by number."""
    total = 0.0
    for row in score.double().tolist():
        moved = [row[int(j)] for j in order]
        for start in range(0, len(moved), of):
            total += sum(sorted(moved[start : start + of])[-count:])
    return total


@pytest.mark.parametrize(("count", "of"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_what_is_kept(count: int, of: int) -> None:
    score = scores(5, 16, sets=2)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in range(2)])
    found = kept(reordered(score, order), (count, of))
    for number in range(2):
        assert float(found[number]) == pytest.approx(kept_by_hand(score[number], order[number], count, of), rel=1e-6)


def test_strong_and_weak_columns_are_dealt_to_the_same_groups() -> None:
    score = torch.tensor([[[5.0, 0.0, 7.0, 2.0, 1.0, 6.0, 3.0, 4.0]]])  # strips 4 1 | 3 6 | 7 0 | 5 2, each second one reversed
    assert dealt(score, 4).tolist() == [[1, 6, 7, 2, 4, 3, 0, 5]]


@pytest.mark.parametrize(("count", "of"), [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_columns_at_a_position_are_given_to_the_groups_that_keep_most(count: int, of: int) -> None:
    """Against all ways to give four groups a column each, scores summed number by number."""
    for seed in range(5):
        score = scores(4, 4 * of, seed=seed)
        order = torch.randperm(4 * of, generator=torch.Generator().manual_seed(seed))
        for position in range(of):
            tried = []
            for places in itertools.permutations(range(4)):
                other = order.clone()
                other[position::of] = order[position::of][list(places)]
                tried.append(kept_by_hand(score[0], other, count, of))
            found = assigned(score, order.unsqueeze(0), position, (count, of))[0]
            left = [j for j in range(4 * of) if j % of != position]
            assert torch.equal(found[left], order[left])
            assert sorted(found.tolist()) == list(range(4 * of))
            assert kept_by_hand(score[0], found, count, of) == pytest.approx(max(tried), rel=1e-6)


def test_turning_leaves_groups_as_they_are() -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(2, 12)
    after = turned(order, 4)
    assert torch.equal(after.unflatten(1, (-1, 4)).sort(2).values, order.unflatten(1, (-1, 4)).sort(2).values)
    assert torch.equal(after[:, :4], order[:, :4])
    assert torch.equal(after[:, 4:8], order[:, [5, 6, 7, 4]])


def test_beside_the_best_of_all_partitions() -> None:
    """Two groups of four: 35 ways to choose who meets the first column."""
    reached = 0
    for seed in range(20):
        score = scores(6, 8, seed=seed)
        ways = [(0, *three) for three in itertools.combinations(range(1, 8), 3)]
        most = max(kept_by_hand(score[0], [*way, *(j for j in range(8) if j not in way)], 2, 4) for way in ways)
        found = kept_by_hand(score[0], best_order(score, (2, 4), 10)[0], 2, 4)
        assert kept_by_hand(score[0], range(8), 2, 4) - 1e-6 <= found <= most + 1e-6
        reached += found > most - 1e-5
    assert reached >= 12


@pytest.mark.parametrize("case", ["columns alike", "nothing", "one row", "one column", "the best order already"])
def test_nothing_is_lost_where_nothing_is_to_gain(case: str) -> None:
    score = scores(4, 16, sets=3)
    if case == "columns alike":
        score = score[:, :, :1].expand_as(score).contiguous()
    if case == "nothing":
        score = torch.zeros_like(score)
    if case == "one row":
        score = score[:, :1]
    if case == "one column":
        score[:, :, 1:] = 0
    if case == "the best order already":
        score = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(3, 4, 4)
    order = best_order(score, (2, 4), 10)
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(3, 16))
    assert bool((kept(reordered(score, order), (2, 4)) >= kept(score, (2, 4))).all())
    if case in ("columns alike", "nothing", "the best order already"):
        assert torch.equal(order, torch.arange(16).expand(3, 16))


def test_an_assignment_that_keeps_less_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rounding of the distances could give one."""
    import scipy.optimize

    monkeypatch.setattr(
        permute, "linear_sum_assignment", lambda d, maximize: scipy.optimize.linear_sum_assignment(d, maximize=not maximize)
    )
    score = scores(6, 16, sets=2)
    order = best_order(score, (2, 4), 10)
    assert bool((kept(reordered(score, order), (2, 4)) >= kept(score, (2, 4))).all())


def test_parts_exchange_columns_within_themselves() -> None:
    score = scores(5, 32, sets=2)
    start = torch.arange(32).expand(2, 32)
    found = refined_in_parts(score, start, (2, 4), 2, 2)
    for number in range(2):
        even = [j for j in range(32) if j // 4 % 2 == 0]  # of every second group
        assert sorted(found[number, :16].tolist()) == even
        alone = refined(score[number : number + 1][:, :, even], torch.arange(16).unsqueeze(0), (2, 4), 2)[0]
        assert found[number, :16].tolist() == [even[int(j)] for j in alone]
    assert bool((kept(reordered(score, found), (2, 4)) > kept(score, (2, 4))).all())
    assert torch.equal(refined_in_parts(score, start, (2, 4), 10, 1), refined(score, start, (2, 4), 10))
    in_parts, whole = (float(kept(reordered(score, best_order(score, (2, 4), 10, n)), (2, 4)).sum()) for n in (2, 8))
    assert in_parts < whole


@pytest.mark.parametrize(
    ("groups", "most", "parts"), [(192, 512, 1), (2752, 512, 8), (512, 512, 1), (1024, 512, 2), (1021, 512, 1)]
)
def test_parts_are_equal_and_not_tiny(groups: int, most: int, parts: int) -> None:
    assert parts_of(groups, most) == parts


def test_sets_do_not_touch_each_other() -> None:
    score = scores(6, 16, sets=3)
    together = best_order(score, (2, 4), 10)
    for number in range(3):
        assert torch.equal(together[number], best_order(score[number : number + 1], (2, 4), 10)[0])


@pytest.mark.parametrize("family", some(TINY, "llama", "gpt2", "phi3", "qwen2_moe", "gpt_oss"))
def test_logits_stay_in_every_family(family: str, tiny: Tiny) -> None:
    """And every linear that reads heads or the channels of an MLP or expert gets an order that keeps as much or more."""
    folder = tiny(family)
    before, _ = transformed.run(folder, None)
    after, notes = transformed.run(folder, Permute(pattern="2:4"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-5)
    source = Source.open(folder)
    inventory = take_inventory(source, find_family(source))
    readers = {channels.output for channels in inventory.family.channels}
    readers |= {kind for kind in ("self_attn.o_proj", "self_attn.out_proj", "attn.c_proj")}
    for site in inventory.sites:
        if site.block is None:
            continue
        if site.kind in readers:
            assert notes[site.name]["kept"] >= notes[site.name]["kept_before"], site.name
        else:
            assert notes[site.name] == {"order": "as it was: its input is read by all of the block"}
    gains = [note["kept"] - note["kept_before"] for note in notes.values() if "kept" in note]
    assert sum(gain > 0 for gain in gains) > 0.9 * len(gains)


def test_heads_that_share_values_share_an_order(tiny: Tiny) -> None:
    """Columns of o_proj go where the rows of v_proj go, in every head of a KV group, and in no other head."""
    changed: dict[str, Tensor] = {}

    class Kept(Permute):
        def __call__(self, block: Any) -> Any:
            result = super().__call__(block)
            changed.update(result.weights)
            return result

    folder = tiny("llama")
    transformed.run(folder, Kept(pattern="2:4"))
    source = Source.open(folder)
    orders = set()
    for block in range(3):
        base = f"model.layers.{block}.self_attn."
        values, after = source.tensor(f"{base}v_proj.weight"), changed[f"{base}v_proj"]
        output, reads = source.tensor(f"{base}o_proj.weight"), changed[f"{base}o_proj"]
        for group in range(2):
            rows = [int((values == after[row]).all(1).nonzero()) for row in range(8 * group, 8 * group + 8)]
            assert sorted(rows) == list(range(8 * group, 8 * group + 8))
            orders.add(tuple(row % 8 for row in rows))
            for head in (2 * group, 2 * group + 1):
                assert torch.equal(reads[:, 8 * head : 8 * head + 8], output[:, [8 * head + row % 8 for row in rows]])
    assert len(orders) > 3


def test_what_stays_in_its_order_is_said(tiny: Tiny) -> None:
    folder = tiny("llama")
    _, notes = transformed.run(folder, Permute(pattern="2:4"), ["*.o_proj", "*.v_proj", "*.down_proj", "*.up_proj"])
    assert notes["model.layers.0.mlp.down_proj"] == {
        "order": "as it was: model.layers.0.mlp.gate_proj is not compressed by this recipe, or not matched"
    }
    assert "kept" in notes["model.layers.0.self_attn.o_proj"]
    before, _ = transformed.run(folder, None)
    after, notes = transformed.run(folder, Permute(pattern="5:16"))
    assert notes["model.layers.0.self_attn.o_proj"] == {"order": "as it was: 8 channels of a head are not a multiple of 16"}
    assert "kept" in notes["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("score", ["ria", "wanda", "error"])
def test_scores(score: str) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    square = torch.rand(8, generator=torch.Generator().manual_seed(1))
    found = Permute(score=score).scores(weight, square)  # type: ignore[arg-type]
    size = weight.abs()
    expected = {
        "ria": (size / size.sum(0) + size / size.sum(1, keepdim=True)) * square**0.25,
        "wanda": size * square.sqrt(),
        "error": weight**2 * square,
    }
    torch.testing.assert_close(found, expected[score])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_keeps_n_of_m_and_more_of_what_matters(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    method = steps("prune/wanda", **TWO_OF_FOUR, update=True)
    run(tiny(family), tmp_path / "plain", ids, method)
    run(tiny(family), tmp_path / "out", ids, method, **STAGE)
    rows = {row.site: row for row in read_rows(tmp_path / "out" / "report.jsonl")}
    plain = {row.site: row for row in read_rows(tmp_path / "plain" / "report.jsonl")}
    packed = PackedSource.open_packed(tmp_path / "out")
    for site in packed.table:
        keep = packed.compressed(site).keep
        assert keep is not None
        assert bool((keep.mask().unflatten(1, (-1, 4)).sum(2) == 2).all())
    first = [site for site, row in rows.items() if row.block == 0 and "kept" in row.notes["transform/permute"]]
    assert sum(rows[site].error for site in first) < sum(plain[site].error for site in first)


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if block == 2:
            raise Stop

    method = steps("prune/wanda", **TWO_OF_FOUR)
    run(tiny("qwen2"), tmp_path / "whole", ids, method, **STAGE)
    with pytest.raises(Stop):
        run(tiny("qwen2"), tmp_path / "stopped", ids, method, progress=progress, **STAGE)
    run(tiny("qwen2"), tmp_path / "stopped", ids, method, **STAGE)
    assert digests(tmp_path / "whole") == digests(tmp_path / "stopped")


def test_no_token_is_said(tiny: Tiny) -> None:
    place = permute.Permutable("a", torch.arange(8).view(1, 1, 8))

    class Fake:
        def weight(self, site: str) -> Tensor:
            return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

        def rounding(self, site: str) -> Permute:
            return Permute()

    order, notes = Permute(pattern="2:4").order(Fake(), place, torch.zeros(8))  # type: ignore[arg-type]
    assert order is not None
    assert notes["fallback"] == "by weights alone: no token was seen"


def test_options_are_checked(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    for wrong in ({"pattern": "4:2"}, {"rounds": -1}, {"score": "sgpt"}):
        with pytest.raises(ValidationError):
            Permute(**wrong)  # type: ignore[arg-type]
    assert Permute(pattern=124).pattern == "2:4"  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="prune/wanda has no pattern here"):
        run(tiny("llama"), tmp_path / "out", ids, steps("prune/wanda", sparsity=0.5), **STAGE)


def test_the_command(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from compress.cli import app

    command = ["prune", str(tiny("llama")), "-o", str(tmp_path / "out"), "--method", "permute+magnitude", "--pattern", "2:4"]
    done = CliRunner().invoke(app, [*command, "--data", str(ids), "--no-reload", "-q"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "out" / "report.jsonl")
    assert {row.method for row in rows} == {"prune/magnitude"}
    assert sum("kept" in row.notes["transform/permute"] for row in rows) == 6
