"""The Python API: the results and errors of the command line, from functions that print nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Run
from command_line import command as run_command
from runs import digests, ids_file

import compress
from compress import api
from compress.errors import in_python

Tiny = Callable[..., Path]
OPTIONS = compress.RunOptions(device="cpu")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    """A llama of one block."""
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line in this process."""
    return partial(run_command, monkeypatch, capsys)


@pytest.fixture(autouse=True)
def nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """Look after every test whether the API itself printed something."""
    yield
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")


def through_json(values: dict[str, Any]) -> Any:
    """Values as a program meets them that reads JSON: lists for tuples."""
    return json.loads(json.dumps(values))


def test_quantize_gives_the_bytes_and_figures_of_the_command(command: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    text = ids_file(tmp_path / "held-out.npy", samples=2, seed=5)
    common = ("--data", ids, "--samples", 8, "--device", "cpu", "--dtype", "float32", "--set", "max_shard_size=10KB", "--json")
    theirs = (model, "-o", tmp_path / "theirs", "--bits", 3, "--group-size", 16, "--evaluate", text)
    said = command("quantize", *theirs, *common).json
    outcome = compress.quantize(
        model,
        out=tmp_path / "mine",
        bits=3,
        group_size=16,
        data=compress.DataOptions(str(ids), samples=8),
        dtype="float32",
        changes=["max_shard_size=10KB"],
        options=dataclasses.replace(OPTIONS, evaluate=str(text)),
    )
    assert digests(tmp_path / "mine") == digests(tmp_path / "theirs")
    assert len(digests(tmp_path / "mine")) > 3, "several shards"
    assert outcome.path == tmp_path / "mine"
    assert (outcome.resumed, outcome.exports, outcome.warnings) == (False, (), ())
    assert [row.site for row in outcome.rows] == [json.loads(line)["site"] for line in (outcome.path / "report.jsonl").open()]
    assert outcome.quality is not None
    assert outcome.quality.kl == said["evaluation"]["kl"]
    same = ("bytes_before", "bytes_after", "bits_per_weight", "sites", "weights", "pruned", "watched", "cache")
    assert {key: through_json(outcome.plain())[key] for key in same} == {key: said[key] for key in same}
    assert set(outcome.plain()) == set(said)
    again = compress.quantize(
        model, tmp_path / "mine", bits=3, group_size=16, data=compress.DataOptions(str(ids), samples=8), dtype="float32",
        changes=["max_shard_size=10KB"], options=OPTIONS,
    )  # fmt: skip
    assert again.resumed


def test_quantize_within_a_budget(command: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    common = ("--data", ids, "--device", "cpu", "--method", "rtn", "--set", "max_shard_size=1GB", "--json")
    command("quantize", model, "-o", tmp_path / "theirs", "--bpw", 3.25, *common)
    budget, changes = compress.Budget(bpw=3.25), ["max_shard_size=1GB"]
    outcome = compress.quantize(model, tmp_path / "mine", method="rtn", budget=budget, data=ids, changes=changes, options=OPTIONS)
    assert digests(outcome.path) == digests(tmp_path / "theirs")
    assert 3.0 < outcome.summary["bits_per_compressed_weight"] <= 3.25
    with pytest.raises(compress.RecipeError, match=r"^bits: not with a budget"):
        compress.quantize(model, tmp_path / "other", bits=3, budget=budget, data=ids, options=OPTIONS)


def test_prune_gives_the_bytes_of_the_command(command: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    common = ("--data", ids, "--device", "cpu", "--json")
    said = command("prune", model, "-o", tmp_path / "theirs", "--pattern", "2:4", "--method", "magnitude", *common).json
    pruning = compress.PruningOptions(pattern="2:4", method="magnitude")
    outcome = compress.prune(model, tmp_path / "mine", pruning, data=ids, options=OPTIONS)
    assert digests(outcome.path) == digests(tmp_path / "theirs")
    assert through_json(outcome.plain())["pruned"] == said["pruned"]
    assert {row.notes["sparsity"] for row in outcome.rows} == {0.5}


def test_prune_with_a_sparsity_for_every_weight(command: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    common = ("--data", ids, "--device", "cpu", "--json")
    command("prune", model, "-o", tmp_path / "theirs", "--distribute", "global", "--method", "magnitude", *common)
    pruning = compress.PruningOptions(method="magnitude", distribute="global")
    outcome = compress.prune(model, tmp_path / "mine", pruning, data=ids, options=OPTIONS)
    assert digests(outcome.path) == digests(tmp_path / "theirs")


@pytest.mark.parametrize("given", ["file", "values", "recipe"])
def test_run_gives_the_bytes_of_the_command(given: str, command: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    values = {"steps": [{"match": "*.mlp.*", "method": "quant/rtn", "options": {"bits": 4, "group_size": 16}}]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    export = ("--format", "compressed-tensors", "--target", "vllm")
    command("run", file, model, "-o", tmp_path / "theirs", "--data", ids, "--device", "cpu", "--watch", 1, "--json", *export)
    recipe = {"file": file, "values": values, "recipe": api.read_recipe(file, data=ids)}[given]
    options = dataclasses.replace(OPTIONS, formats=("compressed-tensors",), target="vllm")
    data = None if given == "recipe" else ids
    outcome = compress.run(recipe, model, tmp_path / "mine", data=data, watch=1, options=options)
    assert digests(outcome.path) == digests(tmp_path / "theirs")
    assert [export["format"] for export in outcome.exports] == ["compressed-tensors"]
    assert digests(tmp_path / "mine-compressed-tensors") == digests(tmp_path / "theirs-compressed-tensors")
    assert len(outcome.summary["watched"]) == 1
    assert ["fast kernels" in warning for warning in outcome.warnings] == [True]


def test_a_recipe_that_is_made_is_not_changed(model: Path, tmp_path: Path) -> None:
    made = api.read_recipe({"steps": [{"match": "*", "method": "quant/rtn"}]})
    with pytest.raises(compress.RecipeError, match="recipe: is made already"):
        compress.run(made, model, tmp_path / "out", changes=["steps.0.options.bits=3"])


def test_plan_gives_the_recipe_of_the_command(command: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs" / "plan.yaml"
    file.parent.mkdir()
    given = ("--method", "rtn", "--uniform-siblings", "--check", "--json")
    said = command("plan", model, "--bpw", 3.5, "-o", file, "--data", ids, "--device", "cpu", *given).json
    result = compress.plan(
        model,
        compress.Budget(bpw=3.5),
        data=ids,
        methods=["rtn"],
        uniform_siblings=True,
        check=True,
        folder=tmp_path,
        options=OPTIONS,
    )
    assert result.recipe.model_dump() == api.read_recipe(file).model_dump()
    found = result.planned.plain()
    assert {key: found[key] for key in ("choices", "bits_per_weight", "kl", "measured_kl")} == {
        key: said[key] for key in ("choices", "bits_per_weight", "kl", "measured_kl")
    }


def test_measure_gives_the_figures_of_the_command(command: Run, model: Path, ids: Path) -> None:
    said = command("eval", model, "--original", model, "--data", ids, "--no-speed", "--device", "cpu", "--json").json
    assert through_json(compress.evaluate(model, ids, original=model, speed=False, device="cpu").plain()) == said
    with pytest.raises(compress.RecipeError, match=r"^dtype float7: expected one of float32"):
        compress.evaluate(model, ids, dtype="float7")


def test_retrain_gives_the_bytes_of_the_command(command: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    start = compress.quantize(model, tmp_path / "start", bits=2, group_size=16, data=ids, options=OPTIONS).path
    given = ("--steps", 2, "--batch", 2, "--option", "rate=0.001", "--data", ids, "--device", "cpu", "--json")
    command("retrain", start, "-o", tmp_path / "theirs", *given)
    stage = {"steps": 2, "batch": 2, "options": {"rate": 0.001}, "temperature": 1.0, "labels": 0.0}
    outcome = compress.retrain(start, tmp_path / "mine", stage=stage, data=ids, options=OPTIONS)
    assert digests(outcome.path) == digests(tmp_path / "theirs")
    assert digests(outcome.path)["model.safetensors"] != digests(start)["model.safetensors"]


def test_progress_is_called(model: Path, ids: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str, float]] = []
    compress.quantize(
        model, tmp_path / "out", method="rtn", group_size=16, data=ids, options=OPTIONS,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    steps = [step for _, _, step, _ in seen]
    assert {"compressing", "writing", "checking"} <= set(steps)
    assert all(0 <= block <= blocks and 0 <= share <= 1 for block, blocks, _, share in seen)


ERRORS: list[tuple[tuple[object, ...], dict[str, Any]]] = [
    (("--bits", 9), {"bits": 9}),
    (("--method", "rtm"), {"method": "rtm"}),
    (("--method", "gptq+rtn"), {"method": "gptq+rtn"}),
    (("--method", "hqq", "--set", "nothing"), {"method": "hqq", "changes": ["nothing"]}),
    (("--device", "toaster"), {"options": compress.RunOptions(device="toaster")}),
    (("--memory", "lots"), {"options": compress.RunOptions(memory="lots")}),
    (("--target", "ollama"), {"options": compress.RunOptions(target="ollama")}),
    (("--tensor-parallel", 2), {"options": compress.RunOptions(tensor_parallel=2)}),
    (("--format", "exl2"), {"options": compress.RunOptions(formats=("exl2",))}),
    (("--watch", -1), {"watch": -1}),
    (("--data", "typo.npy", "--group-size", 16), {"data": "typo.npy", "group_size": 16}),
    (("--evaluate", "typo.npy", "--group-size", 16), {"options": compress.RunOptions(evaluate="typo.npy"), "group_size": 16}),
]


@pytest.mark.parametrize(("flags", "arguments"), ERRORS, ids=[str(flags[0]) for flags, _ in ERRORS])
def test_errors_are_those_of_the_command(
    flags: tuple[object, ...], arguments: dict[str, Any], command: Run, model: Path, ids: Path, tmp_path: Path
) -> None:
    data = () if "--data" in flags else ("--data", ids)
    said = command("quantize", model, "-o", tmp_path / "out", *data, *flags)
    with pytest.raises(compress.CompressError) as caught:
        compress.quantize(model, tmp_path / "out", **{"data": ids, **arguments})
    assert (said.code, said.err) == (caught.value.exit_code, f"error: {caught.value.message}\n")
    assert str(caught.value) == in_python(caught.value.message)
    assert f"{flags[0]}" not in str(caught.value), "an argument has no dashes"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("message", "in_words_of_python"),
    [
        (
            "--group-size: means something only with --bits; add --bits 4",
            "group_size: means something only with bits; add bits 4",
        ),
        ("--set a=b: no such place; --no-reload goes on", "changes a=b: no such place; reload=False goes on"),
        ("x; or measure: compress eval OUT --data TEXT --save", "x; or measure: compress eval OUT --data TEXT --save"),
        ("use `compress quantize --bits 4`, or --bits 3", "use `compress quantize --bits 4`, or bits 3"),
        ("command line:\nsteps.0: wrong", "arguments:\nsteps.0: wrong"),
        ("layers.0.down-proj -- 3 of 4", "layers.0.down-proj -- 3 of 4"),
    ],
)
def test_messages_in_words_of_python(message: str, in_words_of_python: str) -> None:
    error = compress.RecipeError(message)
    assert (str(error), error.message) == (in_words_of_python, message)


@pytest.mark.parametrize("given", [{}, {"bpw": 3.0, "max_kl": 0.1}, {"bpw": -1.0}, {"max_kl": float("nan")}])
def test_a_budget_is_one_positive_number(given: dict[str, float]) -> None:
    with pytest.raises(compress.RecipeError, match=r"give one of bpw 3.0, size 4GB or max_kl 0.05|expected a positive number"):
        compress.Budget(**given)  # type: ignore[arg-type]


def test_results_and_options_cannot_be_changed() -> None:
    for kind in (
        compress.Outcome,
        compress.RunOptions,
        compress.DataOptions,
        compress.Budget,
        compress.PruningOptions,
        compress.Quality,
    ):
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_the_package_has_what_it_says() -> None:
    for name in compress.__all__:
        assert getattr(compress, name) is not None
        if name not in ("__version__",):
            assert getattr(compress, name).__doc__
    assert set(dir(compress)) == set(compress.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        compress.quantise  # type: ignore[attr-defined]  # noqa: B018
