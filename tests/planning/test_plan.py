"""`compress plan` from end to end: the recipe does what was planned, budgets are met, measurements are kept, errors are clear."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import Run
from runs import ids_file
from thorough import some

from compress.errors import RecipeError
from compress.planning import budget as plan_budget
from compress.planning import choices as plan_choices
from compress.planning import planner
from compress.planning import sensitivity as sensitivity_module
from compress.planning import store as measured
from compress.planning.candidates import default_candidates, parse_candidates
from compress.planning.sensitivity import split
from compress.planning.store import MeasurementFile
from compress.recipe import reading as recipe_reading
from compress.report.rows import read_rows
from compress.runs import prepare as run_prepare

Tiny = Callable[..., Path]


@pytest.fixture
def run(run: Run) -> Run:
    """Commands that take a device run on the CPU."""
    return lambda *arguments: run(*arguments, "--device", "cpu")


_SMALL = ("gptq:bits=2,group_size=16", "gptq:bits=3,group_size=16", "rtn:bits=5,group_size=-1")
SMALL = tuple(argument for text in _SMALL for argument in ("--candidates", text))


@pytest.mark.parametrize("family", some(["llama", "mixtral", "gpt_oss", "gpt2"], "llama", "gpt_oss"))
def test_a_plan_is_run_as_it_was_planned(family: str, tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    done = run("plan", tiny(family), "--bpw", 3.5, "-o", path, "--data", ids, "--json", *SMALL)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["bits_per_weight"] <= 3.5
    assert found["exact"]
    done = run("run", path, tiny(family), "-o", out, "--quiet")
    assert done.code == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    rows = read_rows(out / "report.jsonl")
    assert summary["bytes_after"] == found["bytes"]
    assert sum(row.stored_bits for row in rows) == found["bits"]
    assert summary["bits_per_compressed_weight"] == pytest.approx(found["bits_per_weight"], abs=1e-12)
    labels = {row.site: row.method for row in rows}
    assert {name: label.split("(")[0] for name, label in found["choices"].items()} == {
        name: method.removeprefix("quant/") for name, method in labels.items()
    }
    assert len(set(found["choices"].values())) > 1
    assert summary["identity"]["calibration"], "the data of the plan goes into the recipe"
    assert yaml.safe_load(path.read_text())["data"]["name"] == str(ids)


def test_a_size_is_that_of_the_checkpoint(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    assert run("plan", tiny("llama"), "--size", "37KB", "-o", path, "--data", ids, *SMALL).code == 0
    assert run("run", path, tiny("llama"), "-o", out, "--quiet").code == 0
    after = json.loads((out / "summary.json").read_text())["bytes_after"]
    assert 36_800 < after <= 37_000


def test_measurements_are_kept_and_used_again(
    tiny: Tiny, ids: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("plan", tiny("llama"), "--data", ids, *SMALL)
    first = run(*common, "--bpw", 4, "-o", tmp_path / "four.yaml")
    assert "kept in" in first.out
    assert "block 1/6" in first.err
    assert "gradients" in first.err
    (kept,) = tmp_path.glob("sensitivity-*.json")
    again = run(*common, "--bpw", 4, "-o", tmp_path / "again.yaml")
    assert "reused from" in again.out
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "four.yaml").read_bytes()

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(measured, "measure", never)
    other = run(*common, "--bpw", 3, "-o", tmp_path / "three.yaml", "--planner", "lim")
    assert (other.code, "reused from" in other.out) == (0, True)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", [])
    for text in ("{}", "not JSON", json.dumps({"identity": {}, "sensitivity": {}, "checks": {}})):
        kept.write_text(text)
        found = MeasurementFile(*prepared(tiny("llama"), ids), parse_candidates(SMALL[1::2]), tmp_path)
        assert (found.path, found.sensitivity) == (kept, None)


def prepared(model: Path, ids: Path) -> tuple[Any, Any]:
    plan = planner.prepared(str(model), {"name": str(ids)}, None, "cpu")
    return plan, run_prepare.calibration(plan)


def test_other_data_or_candidates_are_measured_anew(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    candidates = parse_candidates(SMALL[1::2])
    plan, tokens = prepared(tiny("llama"), ids)
    names = {
        MeasurementFile(plan, tokens, candidates, tmp_path).path.name,
        MeasurementFile(plan, tokens[:-1], candidates, tmp_path).path.name,
        MeasurementFile(plan, tokens, candidates[:-1], tmp_path).path.name,
        MeasurementFile(*prepared(tiny("gpt2"), ids), candidates, tmp_path).path.name,
    }
    assert len(names) == 4


def test_a_kl_is_measured_and_met(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    common = ("plan", tiny("llama"), "--data", ids, *SMALL, "--candidates", "gptq:bits=6,group_size=16", "--json")
    sizes = []
    for limit in (0.2, 0.05, 0.01):
        done = run(*common, "--max-kl", limit, "-o", tmp_path / f"{limit}.yaml")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["kl"] <= limit
        assert found["measured_kl"] <= limit
        sizes.append(found["bits"])
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    done = run(*common, "--max-kl", 0.2, "-o", tmp_path / "again.yaml")
    assert json.loads(done.out)["bits"] == sizes[0]


def test_a_plan_that_measures_above_is_made_again(tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions that are half of what is measured: the plan becomes larger, and in the end it is within."""
    plan, tokens = prepared(tiny("llama"), ids)
    candidates = parse_candidates([*SMALL[1::2], "gptq:bits=6,group_size=16"])
    real = measured.check

    def doubled(*arguments: Any) -> tuple[float, float | None]:
        kl, error = real(*arguments)
        return 2 * kl, error

    monkeypatch.setattr(measured, "check", doubled)
    budget = plan_budget.Budget.of(None, None, 0.1)
    made = planner.make(plan, tokens, candidates, budget, tmp_path, lambda *_: None)
    assert made.measured is not None
    assert made.measured[0] <= 0.1
    assert made.point.kl < 0.07


def test_uniform_predictions_are_the_measured_references(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    """A candidate's factor makes up for all that its sites add up to when they are compressed together."""
    found = json.loads(run("plan", tiny("llama"), "--data", ids, *SMALL, "--json", "--bpw", 4, "-o", tmp_path / "r.yaml").out)
    predicted = {row["candidate"]: row["kl"] for row in found["uniform"]}
    assert len(found["references"]) == 3
    for reference in found["references"]:
        assert predicted[reference["candidate"]] == pytest.approx(reference["measured"], rel=1e-9)
        assert reference["predicted"] != pytest.approx(reference["measured"], rel=1e-3), "else this shows nothing"


def test_check_measures_a_plan(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    common = ("plan", tiny("llama"), "--data", ids, *SMALL, "--json", "--bpw", 4)
    assert json.loads(run(*common, "-o", tmp_path / "a.yaml").out)["measured_kl"] is None
    assert json.loads(run(*common, "-o", tmp_path / "b.yaml", "--check").out)["measured_kl"] > 0
    shown = run(*common[:-3], "--bpw", 4, "-o", tmp_path / "c.yaml", "--check").out
    assert "predicted, " in shown
    assert " measured" in shown


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_measured_is_what_a_run_with_the_transforms_gives(family: str, tiny: Tiny, run: Run, tmp_path: Path) -> None:
    """A run on the windows that the statistics see, measured on those that they do not see."""
    ids, model = ids_file(tmp_path / "ids.npy", 24, 32), tiny(family)
    fit, probe = split(torch.from_numpy(np.load(ids)))
    for name, part in (("fit", fit), ("probe", probe)):
        np.save(tmp_path / f"{name}.npy", part.numpy())
    found = {}
    for method in ("gptq", "drift+gptq"):
        path, out = tmp_path / "recipe.yaml", tmp_path / method
        common = ("--data", ids, "--bpw", 4, "--check", "--candidates", "gptq:bits=3,group_size=16", "--dtype", "float32")
        done = run("plan", model, "-o", path, *common, "--method", method, "--json")
        assert done.code == 0, done.err
        planned = json.loads(done.out)["measured_kl"]
        stages = yaml.safe_load(path.read_text()).get("transforms", [])
        assert [stage["method"] for stage in stages] == (["transform/drift"] if "+" in method else [])
        assert run("run", path, model, "-o", out, "--data", tmp_path / "fit.npy", "--quiet", "--no-reload").code == 0
        done = run("eval", out, "--original", model, "--data", tmp_path / "probe.npy", "--no-speed", "--json")
        found[method] = planned, json.loads(done.out)["kl"]
        assert planned == pytest.approx(found[method][1], rel=2e-3)
    # Not because both do nothing.
    assert abs(found["gptq"][0] / found["drift+gptq"][0] - 1) > 0.01


def test_methods_of_a_plan_share_their_transforms(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    mixed = ("--method", "drift+gptq", "--method", "bipolar")
    done = run("plan", tiny("llama"), "--bpw", 4, "-o", tmp_path / "r.yaml", "--data", ids, *mixed)
    assert done.code == 2
    assert "--method bipolar: a plan has the same transforms for all its methods; drift+gptq has others" in done.err


@pytest.mark.parametrize("planner", ["milp", "lim", "zd", "uniform"])
def test_every_planner_meets_the_budget(planner: str, tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    common = ("plan", tiny("llama"), "-o", tmp_path / "r.yaml", "--data", ids, "--json", *SMALL)
    done = run(*common, "--bpw", 3.7, "--planner", planner)
    found = json.loads(done.out)
    assert found["planner"] == planner
    assert found["bits_per_weight"] <= 3.7
    by_block = {}
    for name, label in found["choices"].items():
        by_block.setdefault(name.split(".")[2], set()).add(label)
    assert planner == "milp" or all(len(labels) == 1 for labels in by_block.values())
    assert planner != "uniform" or len(set(found["choices"].values())) == 1


def test_siblings_get_the_same(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    common = ("plan", tiny("mixtral"), "--bpw", 3.6, "--data", ids, "--json", *SMALL)
    free, same = (
        json.loads(run(*common, "-o", tmp_path / f"{n}.yaml", *more).out) for n, more in enumerate(((), ("--uniform-siblings",)))
    )
    assert same["kl"] > free["kl"]

    def apart(found: dict[str, Any]) -> int:
        groups: dict[str, set[str]] = {}
        for name, label in found["choices"].items():
            head, leaf = name.rsplit(".", 1)
            kind = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "w1": "up", "w3": "up"}.get(leaf, leaf)
            groups.setdefault(f"{head}.{kind}", set()).add(label)
        return sum(len(labels) > 1 for labels in groups.values())

    assert apart(same) == 0
    assert apart(free) > 0


def test_fused_experts_get_the_same(tiny: Tiny, ids: Path) -> None:
    plan, _ = prepared(tiny("gpt_oss"), ids)
    sites = sensitivity_module.sites_of(plan)
    groups = plan_choices.together(sites, siblings=False)
    assert any(len(members) > 1 for members in groups)
    assert all(len({site.tensor for site in members}) == 1 for members in groups)
    assert sum(len(members) for members in groups) == len(sites)
    joined = plan_choices.together(sites, siblings=True)
    assert len(joined) < len(groups)


@pytest.mark.charts
def test_a_plot_is_drawn(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    common = ("plan", tiny("llama"), "--bpw", 4, "--data", ids, *SMALL)
    assert run(*common, "-o", tmp_path / "r.yaml").code == 0
    assert "<svg" in (tmp_path / "r.svg").read_text()
    assert run(*common, "-o", tmp_path / "r.yaml", "--plot", tmp_path / "p.png").code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    done = run(*common, "-o", tmp_path / "r.yaml", "--plot", tmp_path / "p.docx")
    assert (done.code, "p.docx" in done.err) == (2, True)


def test_defaults_fit_every_model(tiny: Tiny, ids: Path) -> None:
    for family in ("llama", "gpt2", "qwen2_moe"):
        sites = sensitivity_module.sites_of(prepared(tiny(family), ids)[0])
        found = default_candidates(["gptq", "rtn"], sites)
        assert {c.method for c in found} == {"quant/gptq", "quant/rtn"}
        assert all(any(c.build.check(site.shape) is None for c in found) for site in sites)
        assert {c.options["bits"] for c in found} == {2, 3, 4, 5, 6, 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no budget: give one of --bpw"),
        (("--bpw", 3, "--size", "1GB"), "--bpw and --size: give one of"),
        (("--bpw", "nan"), "--bpw nan: expected a positive number"),
        (("--max-kl", -1), "--max-kl -1.0: expected a positive number"),
        (("--size", "big"), "--size: 'big' is not a size"),
        (("--bpw", 0.5), "--bpw 0.5: below 3.0000, the smallest"),
        (("--bpw", 9), "--bpw 9: above 6.0000, the largest"),
        (("--size", "1KB"), "--size of 1,000 bytes: below "),
        (("--size", "1GB"), "--size of 1,000,000,000 bytes: above "),
        (("--max-kl", 1e-9), "--max-kl 1e-09: below "),
        (("--max-kl", 50), "--max-kl 50: above "),
        (("--bpw", 4, "--planner", "best"), "plan/best: no such planner; known are plan/lim"),
        (("--bpw", 4, "--candidates", "gptq:group_size=48"), "gptq(group_size=48) fits no weight of this model; model.layers.0"),
        (("--bpw", 4, "--candidates", "gptq:bits=2,group_size=16"), "gptq(bits=2, group_size=16) is there twice"),
        (("--bpw", 4, "--candidates", "gptq:bits"), "expected METHOD:option=value"),
        (("--bpw", 4, "--candidates", "gptq:bit=2"), "did you mean bits?"),
        (("--bpw", 4, "--candidates", "gptr"), "did you mean quant/gptq?"),
        (("--bpw", 4, "--candidates", "none.yaml"), "none.yaml: cannot be read"),
        (("--bpw", 4, "--memory", "much"), "--memory: 'much' is not a size"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[Any, ...], message: str, tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    two = ("--candidates", "gptq:bits=2,group_size=16", "--candidates", "gptq:bits=5,group_size=16")
    done = run("plan", tiny("llama"), "-o", tmp_path / "r.yaml", "--data", ids, *two, *arguments)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "r.yaml").exists()


def test_a_weight_that_no_candidate_fits_is_named(tiny: Tiny, ids: Path, run: Run, tmp_path: Path) -> None:
    done = run("plan", tiny("llama"), "--bpw", 4, "-o", tmp_path / "r.yaml", "--data", ids, "--candidates", "gptq:group_size=64")
    assert done.code == 2
    assert "none fits model.layers.0.self_attn.q_proj, 32 x 32" in done.err


def test_candidates_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "candidates.yaml"
    path.write_text("- {method: quant/gptq, options: {bits: 3}}\n- method: rtn\n")
    assert [c.label for c in parse_candidates([str(path)])] == ["gptq(bits=3)", "rtn()"]
    for text in (
        "a: 1",
        "- 3",
        "- {method: rtn, option: {}}",
        "- {method: rtn, options: 3}",
        "[",
        "- {method: rtn, options: {bits: 99}}",
    ):
        path.write_text(text)
        with pytest.raises(RecipeError):
            parse_candidates([str(path)])


def test_a_method_of_whole_blocks_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.methods.quant.rtn import RTN

    monkeypatch.setattr(RTN, "scope", "block")
    with pytest.raises(RecipeError, match="one weight at a time"):
        parse_candidates(["rtn:bits=3"])


def test_ranks_are_told_to_plan_first(tiny: Tiny, ids: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("plan", tiny("llama"), "--bpw", 4, "-o", tmp_path / "r.yaml", "--data", ids, *SMALL)
    assert (done.code, "planning runs in one process" in done.err) == (2, True)


def test_quantize_with_a_budget_keeps_its_plan(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ids = ids_file(tmp_path / "ids.npy")
    done = run("quantize", tiny("llama"), "-o", out, "--bpw", 3.5, "--data", ids, "--set", "max_shard_size=20KB")
    assert done.code == 0, done.err
    kept = recipe_reading.load(str(out / "recipe.yaml"))
    assert "for 3.5 bits per weight" in kept.description
    assert kept.max_shard_size == "20KB"
    assert json.loads((out / "summary.json").read_text())["bits_per_compressed_weight"] <= 3.5
    again = run("quantize", tiny("llama"), "-o", out, "--bpw", 3.5, "--data", ids, "--set", "max_shard_size=20KB")
    assert "reused from" in again.out
    assert "is there already, made by the same job" in again.out
    assert np.load(ids).shape == (12, 16)


def test_a_dry_run_says_which_budgets_are_possible(tiny: Tiny, ids: Path, tmp_path: Path, run: Run) -> None:
    """Nothing is written; sizes are those of checkpoints with that candidate for all weights."""
    from runs import compress, steps

    common = ("plan", tiny("llama"), "-o", tmp_path / "r.yaml", "--data", ids, "--dry-run")
    wanted = ("--candidates", "rtn:bits=3,group_size=16", "--candidates", "rtn:bits=5,group_size=32")
    found = run(*common, "--bpw", 4, *wanted, "--json").json
    assert [row["bits_per_weight"] for row in found["candidates"]] == [4.0, 5.5]
    assert found["possible"] is True
    compress(tiny("llama"), tmp_path / "out", None, steps("quant/rtn", bits=3, group_size=16))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["candidates"][0]["bytes"] == summary["bytes_after"] == found["smallest"]
    assert "below what any candidate takes" in run(*common, "--bpw", 3.5, *wanted).out
    assert not (tmp_path / "r.yaml").exists()
