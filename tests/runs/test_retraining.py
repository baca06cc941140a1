"""Training of whole models on the original's predictions: gradients, zeros, stopping, and what recipe and command say of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import compress as run
from runs import digests, steps
from thorough import some
from torch import Tensor
from typer.testing import CliRunner

from compress.blockwise.forward import last_hidden
from compress.checkpoint.packed_source import PackedSource
from compress.cli import app
from compress.errors import CheckpointError, RecipeError
from compress.model.streamed import StreamedModel
from compress.recipe import reading as recipe_reading
from compress.report.rows import read_rows
from compress.runs import prepare as run_prepare
from compress.runs import retraining
from compress.runs.retraining import Training
from compress.runs.student import Student
from compress.verify.verify import verify

Tiny = Callable[..., Path]
STEPS = steps("prune/magnitude", sparsity=0.6)
STAGE: dict[str, Any] = {
    "method": "retrain/perp",
    "options": {"rank": 4, "rate": 1e-2, "relative_rate": 1e-2},
    "steps": 12,
    "batch": 3,
}


class Stop(Exception):
    pass


Make = Callable[..., Training]


@pytest.fixture
def training(ids: Path) -> Iterator[Make]:
    """Return a function that makes a training of a compressed model; originals are filled until the test ends."""
    with ExitStack() as filled:

        def make(model: Path, out: Path, **changes: Any) -> Training:
            values = {
                "data": {"name": str(ids)},
                "dtype": "float32",
                "steps": STEPS,
                "retraining": [{**STAGE, **changes}],
                "batch_tokens": 32,
            }
            plan = run_prepare.prepare(str(model), recipe_reading.parse(values), "cpu")
            streamed = StreamedModel(plan.source, plan.inventory, plan.dtype, plan.device)
            filled.enter_context(streamed.all_blocks())
            student = Student.of_checkpoint(PackedSource.open_packed(out), plan.source, plan.inventory)
            given = run_prepare.calibration(plan)
            return Training(streamed, student, plan.retraining[0], plan.recipe.retraining[0], given, 32, 0)

        yield make


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    run(tiny("llama"), out, ids, STEPS)
    return out


def divergence(teacher: Tensor, student: Tensor) -> float:
    """The mean over tokens of sum p (log p - log q), in float64 and token by token."""
    total, count = 0.0, 0
    for p, q in zip(teacher.double().flatten(0, 1), student.double().flatten(0, 1), strict=True):
        a, b = p.softmax(0), q.softmax(0)
        total += sum(float(x) * (math.log(float(x)) - math.log(float(y))) for x, y in zip(a, b, strict=True))
        count += 1
    return total / count


def test_the_loss_is_the_divergence_from_the_original(tiny: Tiny, pruned: Path, training: Make) -> None:
    from transformers import AutoModelForCausalLM

    made = training(tiny("llama"), pruned)
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)(made.held_ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)(made.held_ids).logits
    assert made.held_out(made.start) == pytest.approx(divergence(original, theirs), rel=1e-4)
    weights = {made.sites[name]: weight.dequantize() for name, weight in made.start.weights.items()}
    lost = float(made._loss(made.held_ids, weights, {})) / made.held_ids.numel()
    assert lost == pytest.approx(divergence(original, theirs), rel=1e-4)
    warm = training(tiny("llama"), pruned, temperature=2.0)
    lost = float(warm._loss(warm.held_ids, weights, {})) / warm.held_ids.numel()
    assert lost == pytest.approx(4 * divergence(original / 2, theirs / 2), rel=1e-4)
    told = training(tiny("llama"), pruned, labels=0.5)
    more = float(told._loss(told.held_ids, weights, {})) - float(made._loss(made.held_ids, weights, {}))
    nats = torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), made.held_ids[:, 1:].flatten(), reduction="sum")
    assert more == pytest.approx(0.5 * float(nats), rel=1e-4)


def test_every_window_is_seen_once_in_a_round_and_none_that_is_held_out(tiny: Tiny, pruned: Path, training: Make) -> None:
    made = training(tiny("llama"), pruned, batch=2)
    per_round = made.train_ids.shape[0] // 2
    rounds = [torch.cat([made._windows(r * per_round + s) for s in range(per_round)]) for r in range(2)]
    for seen in rounds:
        assert sorted(map(tuple, seen.tolist()))[: len(seen)] == sorted(map(tuple, seen.tolist()))
        assert len({tuple(window) for window in seen.tolist()}) == len(seen)
        assert not {tuple(w) for w in seen.tolist()} & {tuple(w) for w in made.held_ids.tolist()}
    assert not torch.equal(*rounds)


@pytest.mark.parametrize("family", some(["llama", "opt", "gpt2", "mixtral"], "gpt2", "mixtral"))
def test_gradients_reach_what_moves_and_zeros_stay(family: str, tiny: Tiny, ids: Path, tmp_path: Path, training: Make) -> None:
    run(tiny(family), tmp_path / "out", ids, STEPS)
    made = training(tiny(family), tmp_path / "out")
    before = made.held_out(made.start)
    for _ in range(3):
        made.take_step()
    moved = made.stored()
    for name, weight in moved.weights.items():
        keep = made.start.weights[name].keep.mask()
        assert not weight.dequantize()[~keep].any()
    changed = [
        name
        for name, weight in moved.weights.items()
        if not torch.equal(weight.base.values, made.start.weights[name].base.values)
    ]
    assert len(changed) > 0.8 * len(moved.weights)  # experts may see no token
    assert any("norm" in name or "ln_" in name for name in moved.others)
    assert made.held_out(moved) < before


def test_a_result_that_is_trained_is_better_and_verified(tiny: Tiny, pruned: Path, ids: Path, tmp_path: Path) -> None:
    command = ["retrain", str(pruned), "-o", str(tmp_path / "better"), "--data", str(ids), "--steps", "16", "--batch", "3", "-q"]
    made = CliRunner().invoke(app, [*command, "--option", "rate=1e-2", "--option", "rank=4", "--json"], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    verify(tmp_path / "better", "cpu", lambda *_: None)
    before, after = PackedSource.open_packed(pruned), PackedSource.open_packed(tmp_path / "better")
    for row in read_rows(tmp_path / "better" / "report.jsonl"):
        notes = row.notes["retrain/perp of the whole model"]
        assert notes["held_out"] < notes["held_out_before"]
        assert notes["steps"] == 16
        keep = before.compressed(row.site).keep.mask()
        assert torch.equal(after.compressed(row.site).keep.mask(), keep)
        assert not after.compressed(row.site).dequantize()[~keep].any()
    written = yaml.safe_load((tmp_path / "better" / "recipe.yaml").read_text())
    assert written["retraining"][0]["steps"] == 16
    again = CliRunner().invoke(app, [*command, "--option", "rate=1e-2", "--option", "rank=4"], catch_exceptions=False)
    assert again.exit_code == 0
    assert not (tmp_path / "better.job").exists()


def test_a_run_that_trains_in_the_end_gives_what_run_and_retrain_give(
    tiny: Tiny, pruned: Path, ids: Path, tmp_path: Path
) -> None:
    stage = {**STAGE, "data": {"name": str(ids), "seed": 0}}
    run(tiny("llama"), tmp_path / "one", ids, STEPS, retraining=[stage], reload=True)
    options = [item for key, value in STAGE["options"].items() for item in ("--option", f"{key}={value}")]
    command = ["retrain", str(pruned), "-o", str(tmp_path / "two"), "--data", str(ids), "--steps", "12", "--batch", "3", "-q"]
    assert CliRunner().invoke(app, [*command, "--seed", "0", *options], catch_exceptions=False).exit_code == 0
    assert digests(tmp_path / "one")["model.safetensors"] == digests(tmp_path / "two")["model.safetensors"]


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["stored often", "not stored"])
def test_a_stopped_training_gives_the_same_bytes(
    seconds: float, tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retraining, "SAVE_SECONDS", seconds)
    seen = []

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if step == "retraining":
            seen.append(share)
            if share >= 0.5:
                raise Stop

    run(tiny("llama"), tmp_path / "whole", ids, STEPS, retraining=[STAGE])
    with pytest.raises(Stop):
        run(tiny("llama"), tmp_path / "stopped", ids, STEPS, retraining=[STAGE], progress=progress)
    assert (tmp_path / "stopped.job" / "retraining-0.pt").exists() == (seconds == 0)
    run(tiny("llama"), tmp_path / "stopped", ids, STEPS, retraining=[STAGE])
    assert digests(tmp_path / "whole") == digests(tmp_path / "stopped")
    assert seen[0] == pytest.approx(1 / 12)


def test_a_state_of_another_training_is_left_alone(tiny: Tiny, pruned: Path, tmp_path: Path, training: Make) -> None:
    made = training(tiny("llama"), pruned)
    made.take_step()
    made.save(tmp_path / "state.pt", "mine")
    other = training(tiny("llama"), pruned)
    other.restore(tmp_path / "state.pt", "another")
    assert other.step == 0
    other.restore(tmp_path / "state.pt", "mine")
    assert other.step == 1
    for a, b in zip(made.everything, other.everything, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state().values(), b.state().values(), strict=True))


def test_it_never_makes_things_worse(tiny: Tiny, pruned: Path, tmp_path: Path, training: Make) -> None:
    options = {"rank": 4, "rate": 1.0, "relative_rate": 1.0}
    made = training(tiny("llama"), pruned, options=options, steps=4)
    found, notes = made.run(tmp_path / "state.pt", "mine", lambda *_: None)
    assert notes["held_out"] == notes["held_out_before"]
    assert found is made.start


def test_norms_outside_the_blocks_are_trained_and_stored(tiny: Tiny, pruned: Path, ids: Path, tmp_path: Path) -> None:
    options = {"weights": "none", "relative_rate": 2e-2}
    run(tiny("llama"), tmp_path / "out", ids, STEPS, retraining=[{**STAGE, "options": options}], reload=True)
    source = PackedSource.open_packed(tmp_path / "out")
    original = PackedSource.open_packed(pruned)
    assert not torch.equal(source.tensor("model.norm.weight"), original.tensor("model.norm.weight"))
    for name in source.table:
        assert torch.equal(source.compressed(name).dequantize(), original.compressed(name).dequantize())
    probe = torch.randint(0, 96, (1, 8), generator=torch.Generator().manual_seed(3))
    streamed, hidden = last_hidden(source, probe, torch.float32, torch.device("cpu"))
    with streamed.embeddings_and_head():
        assert bool(streamed.logits(probe, hidden).isfinite().all())


def test_what_is_wrong_is_said(tiny: Tiny, pruned: Path, ids: Path, tmp_path: Path) -> None:
    def say(*more: str) -> str:
        made = CliRunner().invoke(app, ["retrain", str(pruned), "-o", str(tmp_path / "x"), "-q", *more])
        assert isinstance(made.exception, RecipeError | CheckpointError)
        return made.exception.message

    assert "--data" in say("--samples", "3")
    assert "retrain/perp" in say("--method", "porp", "--data", str(ids))
    assert "weights" in say("--option", "weights=dora", "--data", str(ids))
    assert "made from" in say("--data", str(ids), "--original", str(tiny("llama", hidden_size=48, intermediate_size=96)))
    assert json.loads((pruned / "summary.json").read_text())["tool"] == "compress"
