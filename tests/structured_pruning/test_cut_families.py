"""Cutting heads and channels in every family: what is left equals what is zeroed, experts each in their own places."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import loaded, logits, made, quiet
from safetensors.torch import load_file, save_file
from thorough import some
from torch import Tensor

from compress.architecture.channels import channel_rows, rows_left
from compress.architecture.config import settings
from compress.architecture.inventory import take_inventory
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.model.detect import find_family
from compress.recipe.data import Data
from compress.report.templating import escaped
from compress.structured_pruning import importance
from compress.structured_pruning.coupled import Groups
from compress.structured_pruning.sizes import Wish, after, sizes_of
from compress.verify.verify import verify

Tiny = Callable[..., Path]
PROBE = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(5))


def zeroed(model: Path, small: Path, folder: Path) -> dict[str, list[int]]:
    """Write a copy of a model in which the inputs that a smaller one lacks are 0; the columns that stay, by site."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    source, left = Source.open(model), Source.open(small)
    found = {}
    for site in take_inventory(source, find_family(source)).sites:
        whole = tensors[site.tensor] if site.slice is None else tensors[site.tensor][site.slice]
        whole = whole.T if site.transposed else whole
        rest = left.tensor(site.tensor, site.slice)
        rest = rest.T if site.transposed else rest
        if rest.shape[1] < whole.shape[1]:
            rows = rest.T
            columns = [c for c in range(whole.shape[1]) if bool((rows == whole[:, c]).all(1).any())]
            assert len(columns) == rest.shape[1], site.name
            whole[:, [c for c in range(whole.shape[1]) if c not in columns]] = 0
            found[site.name] = columns
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return found


CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "gemma2": ("gemma2", {"heads": 0.5, "channels": 0.25}, {"num_attention_heads": 2, "intermediate_size": 48}),
    "gemma3_text": ("gemma3_text", {"kv_groups": 0.5, "channels": 0.25}, {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma3": ("gemma3", {"heads": 0.5, "channels": 0.5}, {"num_attention_heads": 2, "intermediate_size": 32}),
    "phi3 heads": ("phi3", {"heads": 0.5, "channels": 0.25}, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}),
    "phi3 groups": ("phi3", {"kv_groups": 0.5}, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "gpt2": ("gpt2", {"channels": 0.5}, {"n_inner": 64}),
    "mixtral": ("mixtral", {"heads": 0.5, "channels": 0.25}, {"num_attention_heads": 2, "intermediate_size": 48}),
    "qwen2_moe": (
        "qwen2_moe",
        {"kv_groups": 0.5, "channels": 0.25},
        {"intermediate_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 36, "head_dim": 8},
    ),
    "qwen3_moe": ("qwen3_moe", {"heads": 0.5, "channels": 0.5}, {"intermediate_size": 32, "moe_intermediate_size": 16}),
    "olmoe": ("olmoe", {"channels": 0.5}, {"intermediate_size": 32}),
    "deepseek_v3": (
        "deepseek_v3",
        {"heads": 0.5, "channels": 0.25, "n_shared_experts": 2},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48, "moe_intermediate_size": 24},
    ),
    "deepseek_v3 without q_lora": ("deepseek_v3", {"heads": 0.5, "q_lora_rank": None}, {"num_attention_heads": 2}),
    "gpt_oss": ("gpt_oss", {"heads": 0.5, "channels": 0.25}, {"num_attention_heads": 2, "intermediate_size": 48}),
    "gpt_oss groups": ("gpt_oss", {"kv_groups": 0.5}, {"num_attention_heads": 2, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("case", some(CASES, "gemma3", "phi3 groups", "gpt2", "qwen2_moe", "gpt_oss"))
def test_cutting_equals_zeroing(case: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    family, options, expected = CASES[case]
    wish = {key: value for key, value in options.items() if key in Wish.__dataclass_fields__}
    model = tiny(family, **{key: value for key, value in options.items() if key not in wish})
    summary = made(model, tmp_path / "out", ids, repair=False, **wish)
    kept = zeroed(model, tmp_path / "out", tmp_path / "zeroed")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out"), PROBE), logits(loaded(tmp_path / "zeroed"), PROBE), rtol=1e-4, atol=1e-5
    )
    small = Source.open(tmp_path / "out")
    assert {key: settings(small).get(key) for key in expected} == expected
    assert summary["bytes_after"] < summary["bytes_before"]
    places = {tuple(columns) for name, columns in kept.items() if ".experts." in name}
    assert len(places) > 4 or not any(".experts." in name for name in kept)  # every expert has its own
    verify(tmp_path / "out", "cpu", quiet)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_and_channels_of_those_that_stay(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tiny(family)
    fewer = made(model, tmp_path / "fewer", ids, experts=0.5)
    both = made(model, tmp_path / "both", ids, experts=0.5, channels=0.25, repair=False)
    assert both["experts"] == fewer["experts"]
    zeroed(tmp_path / "fewer", tmp_path / "both", tmp_path / "zeroed")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "both"), PROBE), logits(loaded(tmp_path / "zeroed"), PROBE), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("wish", [{"channels": 0.5, "heads": 0.5}, {"channels": 0.25, "experts": 0.5, "score": "wanda"}])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_stopped_run_of_experts_goes_on_to_the_same_bytes(
    family: str, wish: dict[str, Any], tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runs import digests

    from compress.output.job import Job

    made(tiny(family), tmp_path / "whole", ids, **wish)
    commit = Job.commit

    def stopped(job: Job, record: Any) -> None:
        commit(job, record)
        if len(job.records) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "commit", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(tiny(family), tmp_path / "stopped", ids, **wish)
    monkeypatch.setattr(Job, "commit", commit)
    made(tiny(family), tmp_path / "stopped", ids, **wish)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_repair_makes_up_for_channels_of_experts(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from compress.evaluation.quality import measure

    errors = []
    for repair in (False, True):
        made(tiny("mixtral"), tmp_path / str(repair), ids, channels=0.25, score="wanda", repair=repair)
        found = measure(str(tmp_path / str(repair)), str(tiny("mixtral")), Data(name=str(ids)), "cpu", "float32", False, quiet)
        errors.append(found.kl or 0.0)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("score", ["fisher", "wanda"])
def test_an_expert_that_no_token_reached_is_cut_by_magnitude(score: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("deepseek_v3", n_group=1), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"][3] = -100
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    summary = made(model, tmp_path / "out", ids, channels=0.5, repair=False, score=score)
    name = "model.layers.2.mlp.experts.3.down_proj"
    assert summary["by_magnitude"] == [name]
    weight = tensors[f"{name}.weight"]
    order = weight.square().sum(0).argsort(descending=True)[:16].sort().values
    assert torch.equal(Source.open(tmp_path / "out").tensor(f"{name}.weight"), weight[:, order])
    assert escaped(name) in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("layout", "parts"), [("one", [[0], [1], [2]]), ("halves", [[0, 3], [1, 4], [2, 5]]), ("pairs", [[0, 1], [2, 3], [4, 5]])]
)
def test_rows_of_channels(layout: Any, parts: list[list[int]]) -> None:
    assert channel_rows(layout, 3).T.tolist() == parts
    assert rows_left(layout, 3, torch.tensor([0, 2])).tolist() == sorted(parts[0] + parts[2])


def test_uneven_heads_of_experts_models_load(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tiny("qwen3_moe", num_key_value_heads=4)
    summary = made(model, tmp_path / "out", ids, kv_groups=0.5, uneven=True, repair=False)
    columns = [Source.open(tmp_path / "out").tensor(f"model.layers.{n}.self_attn.o_proj.weight").shape[1] for n in range(3)]
    assert sum(columns) == 3 * 32
    assert len(set(columns)) > 1
    assert summary["sizes"]
    zeroed(model, tmp_path / "out", tmp_path / "zeroed")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out"), PROBE), logits(loaded(tmp_path / "zeroed"), PROBE), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("family", "wish", "complaint"),
    [
        ("mixtral", {"channels": 0.5, "uneven": True}, "not with --channels of experts"),
        ("phi3", {"kv_groups": 0.5, "uneven": True}, "one for all blocks"),
        ("gpt_oss", {"kv_groups": 0.5, "uneven": True}, "one for all blocks"),
        ("olmoe", {"heads": 0.5}, "cannot say that it has fewer"),
        ("gpt2", {"heads": 0.5}, "cannot say that it has fewer"),
    ],
)
def test_what_cannot_be_cut_is_said(family: str, wish: dict[str, Any], complaint: str, tiny: Tiny) -> None:
    source = Source.open(tiny(family))
    with pytest.raises(RecipeError) as caught:
        after(Wish(**wish), find_family(source), sizes_of(source, find_family(source)))
    assert re.search(complaint, caught.value.message)


MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"heads": 0.5, "channels": 0.5}),
    "groups": ("llama", {"kv_groups": 0.5}),
    "phi3": ("phi3", {"heads": 0.5, "channels": 0.5}),
    "phi3 groups": ("phi3", {"kv_groups": 0.5}),
    "gpt2": ("gpt2", {"channels": 0.5}),
    "gpt_oss": ("gpt_oss", {"channels": 0.5, "kv_groups": 0.5}),
}


@pytest.mark.parametrize(("family", "wish"), MIXED.values(), ids=MIXED.keys())
def test_mixed_scores_are_those_of_all_weights_of_a_group(
    family: str, wish: dict[str, Any], tiny: Tiny, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against gradients of transformers' own model, window by window, summed over what zeroing of a group takes away."""
    import numpy as np

    from compress.structured_pruning import cutter as module
    from compress.structured_pruning.cutter import Cutter

    folder = tiny(family)
    source = Source.open(folder)
    inventory = take_inventory(source, find_family(source))
    windows = torch.from_numpy(np.load(ids)).long()[:4]
    cutter = Cutter(source, inventory, Wish(score="mixed", **wish), windows, torch.device("cpu"), quiet)
    found = cutter.scores([0, 1, 2], {})
    monkeypatch.setattr(module, "BUDGET", 1)  # every reader in a portion of its own
    again = cutter.scores([0, 1, 2], {})
    model = loaded(folder)
    parameters = dict(model.named_parameters())
    means = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for window in windows.split(1):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(window).logits[0, :-1], window[0, 1:]).backward()
        for name, p in parameters.items():
            if p.grad is not None:
                means[name] += p.grad / 4
                squares[name] += p.grad.square() / 4
    terms = {n: (p.data * means[n] - p.data**2 * squares[n] / 2).abs().double() for n, p in parameters.items()}
    groups = Groups(inventory.family, cutter.streamed.sites, cutter.before, cutter.left)
    for (block, name), scores in found.items():
        torch.testing.assert_close(again[block, name], scores, rtol=1e-6, atol=1e-12)
        reader = next(r for r in groups.readers(block, None) if r.site.name == name)
        for group in (0, len(scores) - 1):
            expected = 0.0
            for site in groups.members(reader):
                value = terms[site.tensor] if site.slice is None else terms[site.tensor][site.slice]
                value = value.T if site.transposed else value
                expected += float(_part(value, groups, reader, site, group))
            assert float(scores[group]) == pytest.approx(expected, rel=1e-3)


def _part(values: Tensor, groups: Groups, reader: Any, site: Any, group: int) -> Tensor:
    """The sum over what one group has of a matrix (out, in), by slices written out."""
    if site.name == reader.site.name:
        return values[:, group * reader.unit : (group + 1) * reader.unit].sum()
    heads, per, dim = groups.before.heads, groups.before.heads // groups.before.kv_groups, 8
    whole = reader.unit == dim * per
    mine = range(group * per, group * per + per) if whole else [group]
    if reader.channels is not None:
        count = reader.site.shape[1]
        rows = {"one": [group], "halves": [group, group + count], "pairs": [2 * group, 2 * group + 1]}[reader.channels.rows]
        return values[rows].sum()
    if site.kind == "self_attn.qkv_proj":
        first = [range(dim * h, dim * h + dim) for h in mine]
        if whole:
            first += [range(dim * (heads + k), dim * (heads + k) + dim) for k in (group, group + heads // per)]
        return sum((values[list(rows)].sum() for rows in first), torch.tensor(0.0))
    if site.kind == "self_attn.q_proj":
        return sum((values[dim * h : dim * h + dim].sum() for h in mine), torch.tensor(0.0))
    assert whole  # keys and values of a group go with all of its heads only
    return values[dim * group : dim * group + dim].sum()


@pytest.mark.parametrize(
    ("groups", "left", "sets", "rounds", "gone"),
    [(64, 32, 1, 4, [18, 28, 32, 32]), (8, 4, 2, 3, [4, 4, 4]), (100, 50, 1, 2, [44, 50]), (16, 4, 4, 1, [12])],
)
def test_groups_go_by_the_cubic_schedule(groups: int, left: int, sets: int, rounds: int, gone: list[int]) -> None:
    assert [importance.gone_by(groups, left, sets, (n + 1) / rounds) for n in range(rounds)] == gone


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_goes_in_rounds_is_scored_without_what_has_gone(family: str, tiny: Tiny, ids: Path) -> None:
    """Against a loop over transformers' own model, whose columns are zeroed round by round; taylor, window by window."""
    import numpy as np

    from compress.structured_pruning.cutter import Cutter

    folder, rounds = tiny(family), 3
    source = Source.open(folder)
    inventory = take_inventory(source, find_family(source))
    windows = torch.from_numpy(np.load(ids)).long()[:4]
    wish = Wish(score="taylor", channels=0.5, rounds=rounds)
    found = Cutter(source, inventory, wish, windows, torch.device("cpu"), quiet).scores([0, 1, 2], {})
    once = Cutter(source, inventory, Wish(score="taylor", channels=0.5), windows, torch.device("cpu"), quiet).scores(
        [0, 1, 2], {}
    )
    model = loaded(folder)
    readers = {name: (site, _weight(model, site)) for _, name in found for site in inventory.sites if site.name == name}
    gone: dict[str, Tensor] = {name: torch.zeros(64, dtype=torch.bool) for name in readers}
    for number in range(rounds):
        total = {name: torch.zeros(64, dtype=torch.float64) for name in readers}
        for window in windows.split(1):
            model.zero_grad()
            logits_ = model(window, use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits_, window[0, 1:], reduction="sum").backward()
            for name, (site, weight) in readers.items():
                gradient = _gradient(model, site)
                total[name] += (weight * gradient).sum(0).double().abs() / 4
        for name, (_, weight) in readers.items():
            total[name][gone[name]] = -1
            more = 32 * (1 - (1 - (number + 1) / rounds) ** 3)
            gone[name][:] = False
            gone[name][total[name].argsort()[: round(more)]] = True
            with torch.no_grad():
                weight[:, gone[name]] = 0
    different = 0
    for block, name in found:
        kept = importance.kept_of(found[block, name], 32)
        assert kept.tolist() == (~gone[name]).nonzero().flatten().tolist()
        different += kept.tolist() != importance.kept_of(once[block, name], 32).tolist()
    assert different > 0


def _weight(model: Any, site: Any) -> Tensor:
    layer = model.model.layers[site.block]
    found: Tensor = layer.mlp.down_proj.weight.data if site.expert is None else layer.mlp.experts.down_proj.data[site.expert]
    return found


def _gradient(model: Any, site: Any) -> Tensor:
    layer = model.model.layers[site.block]
    found: Tensor = layer.mlp.down_proj.weight.grad if site.expert is None else layer.mlp.experts.down_proj.grad[site.expert]
    return found


def test_a_cut_in_rounds_keeps_as_many(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    summary = made(tiny("llama"), tmp_path / "out", ids, heads=0.5, channels=0.5, rounds=3)
    assert summary["after"]["channels"] == 32
    assert summary["after"]["heads"] == 2
    verify(tmp_path / "out", "cpu", quiet)


@pytest.mark.parametrize("wish", [{"score": "wanda"}, {"score": "mixed"}, {"uneven": True}, {"channels": 0.0, "blocks": 1}])
def test_rounds_need_scores_that_can_be_taken_anew(wish: dict[str, Any], tiny: Tiny) -> None:
    source = Source.open(tiny("llama"))
    with pytest.raises(RecipeError, match="rounds 2"):
        after(Wish(**{"channels": 0.5, "rounds": 2, **wish}), find_family(source), sizes_of(source, find_family(source)))


def test_mixed_is_the_equation() -> None:
    weight, mean, square = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.1]]), torch.tensor([[1.0, 0.6]])
    assert importance.mixed(weight, mean, square).tolist() == [[1.0, pytest.approx(0.4, rel=1e-6)]]
