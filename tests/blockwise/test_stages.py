"""Methods that see a block, in whole runs: bytes after a kill, processes, rewritten norms, seeds, hidden states let go."""

from __future__ import annotations

import gc
import random
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import two_ranks
from runs import compress as run
from runs import digests, killed_at, steps
from thorough import some

from compress.blockwise import hidden_states
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.report.rows import SiteRow, read_rows
from compress.runs.pipeline import Settings

Tiny = Callable[..., Path]
SIGNROUND = steps("quant/signround", bits=2, group_size=16, steps=6, evaluations=2)
NEWTON = steps("quant/gaussnewton", bits=3, group_size=16, steps=3)
GPTQ = steps(bits=2, group_size=16)
TUNING = [{"method": "tune/grid", "options": {"epochs": 2}}]
# A step and what follows it, for each place a method that sees a block can have.
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "signround": (SIGNROUND, {}),
    "gaussnewton": (NEWTON, {}),
    "tuned": (GPTQ, {"tuning": TUNING}),
    "both": (SIGNROUND, {"tuning": TUNING}),
}


def rows_of(out: Path) -> list[SiteRow]:
    return read_rows(out / "report.jsonl")


@pytest.mark.parametrize(
    "settings", [Settings(), Settings(offload=True), Settings(snapshot_seconds=0.0)], ids=["memory", "disk", "kept"]
)
def test_a_run_that_is_killed_gives_the_bytes_of_one_that_is_not(
    settings: Settings, forks: Any, tiny: Tiny, ids: Path, tmp_path: Path
) -> None:
    recipe, more = KINDS["both"][0], {**KINDS["both"][1], "settings": settings}

    def go(event: int, out: Path) -> Any:
        process = forks.Process(target=killed_at, args=(event, tiny("llama"), out, ids, recipe, more))
        process.start()
        process.join()
        return process

    go(0, tmp_path / "reference")
    expected, events = digests(tmp_path / "reference"), int((tmp_path / "reference.events").read_text())
    for event in sorted(random.Random(str(settings)).sample(range(1, events + 1), 3)):
        out = tmp_path / f"killed-{event}"
        assert go(event, out).exitcode == -signal.SIGKILL
        assert go(0, out).exitcode == 0
        assert digests(out) == expected, f"killed at durable step {event} of {events}"


@pytest.mark.parametrize("kind", some(KINDS, "gaussnewton", "both"))
def test_where_hidden_states_are_and_where_a_run_was_stopped_changes_nothing(
    kind: str, tiny: Tiny, ids: Path, tmp_path: Path
) -> None:
    recipe, more = KINDS[kind]

    class Stop(Exception):
        pass

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if block == 2:
            raise Stop

    run(tiny("llama"), tmp_path / "whole", ids, recipe, **more)
    run(tiny("llama"), tmp_path / "disk", ids, recipe, settings=Settings(offload=True, memory=1), **more)
    with pytest.raises(Stop):
        run(tiny("llama"), tmp_path / "stopped", ids, recipe, progress=progress, **more)
    run(tiny("llama"), tmp_path / "stopped", ids, recipe, **more)
    assert digests(tmp_path / "whole") == digests(tmp_path / "disk") == digests(tmp_path / "stopped")


@pytest.mark.parametrize("kind", ["signround", "both"])
def test_two_processes_give_the_bytes_of_one(kind: str, forks: Any, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """A step looks at the same batch however many share the work, and adding zeros changes no bit: only the start may differ."""
    recipe, more = KINDS[kind]
    recipe = [{**recipe[0], "options": {**recipe[0]["options"], "start": "mse"}}]
    values = {"data": {"name": str(ids)}, "dtype": "float32", "batch_tokens": 64, "steps": recipe, **more}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    two_ranks(forks, tmp_path, "run", tmp_path / "recipe.yaml", tiny("llama"), "-o", tmp_path / "two", "--no-reload")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(tiny("llama"), tmp_path / "one", ids, recipe, **more)
    torch.set_num_threads(threads)
    one, two = PackedSource.open_packed(tmp_path / "one"), PackedSource.open_packed(tmp_path / "two")
    assert set(one.table) == set(two.table)
    for site in one.table:
        mine, theirs = one.compressed(site).base, two.compressed(site).base
        assert torch.equal(mine.codes, theirs.codes), site
        assert torch.equal(mine.scale, theirs.scale), site
    assert {r.site: r.notes for r in rows_of(tmp_path / "one")}.keys() == {
        r.site: r.notes for r in rows_of(tmp_path / "two")
    }.keys()


@pytest.mark.parametrize("family", some(["llama", "opt", "gpt2", "mixtral", "gemma3_text"], "gpt2", "mixtral"))
def test_norms_are_rewritten_stored_and_loaded(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """The written model gives, in transformers, the outputs that the run compared with; codes are those without tuning."""
    from transformers import AutoModelForCausalLM

    from compress.blockwise.forward import last_hidden

    run(tiny(family), tmp_path / "plain", ids, GPTQ)
    summary = run(tiny(family), tmp_path / "tuned", ids, GPTQ, tuning=TUNING)
    assert summary.values["check"]["difference"] < 1e-5
    original, tuned = Source.open(tiny(family)), PackedSource.open_packed(tmp_path / "tuned")
    kept = [name for name in original.entries if name.removesuffix(".weight") not in tuned.table]
    changed = [name for name in kept if not torch.equal(original.tensor(name), tuned.tensor(name))]
    assert changed
    assert all(original.tensor(name).ndim == 1 for name in changed)
    assert all(original.tensor(name).dtype == tuned.tensor(name).dtype for name in changed)
    plain = PackedSource.open_packed(tmp_path / "plain")
    first = [site for site in tuned.table if ".0." in site and "experts" not in site]
    assert all(torch.equal(plain.compressed(s).base.codes, tuned.compressed(s).base.codes) for s in first)
    assert any(not torch.equal(plain.compressed(s).base.scale, tuned.compressed(s).base.scale) for s in first)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    probe = torch.from_numpy(np.load(ids)[:2].astype(np.int64))
    with torch.no_grad():
        loaded = model(probe, use_cache=False).logits
    streamed, states = last_hidden(tuned, probe, torch.float32, torch.device("cpu"))
    with streamed.embeddings_and_head():
        assert torch.allclose(loaded, streamed.logits(probe, states), atol=2e-4)


def test_tuning_takes_the_sites_that_match_and_says_what_it_did(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    stage = {"method": "tune/grid", "match": "*.mlp.*", "options": {"epochs": 2, "norms": False}}
    run(tiny("llama"), tmp_path / "plain", ids, GPTQ)
    run(tiny("llama"), tmp_path / "tuned", ids, GPTQ, tuning=[stage])
    plain, tuned = (PackedSource.open_packed(tmp_path / name) for name in ("plain", "tuned"))
    for row in rows_of(tmp_path / "tuned"):
        assert ("tune/grid" in row.notes) == (".mlp." in row.site)
        if row.block == 0:
            same = torch.equal(plain.compressed(row.site).base.scale, tuned.compressed(row.site).base.scale)
            assert same == (".mlp." not in row.site)
            if not same:
                assert row.notes["tune/grid"]["loss"] < row.notes["tune/grid"]["loss_before"]
    with pytest.raises(RecipeError, match="takes no weight in a block"):
        run(tiny("llama"), tmp_path / "none", ids, GPTQ, tuning=[{**stage, "match": "lm_head"}])


def test_report_describes_what_was_tuned(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """The notes of a site have the error of its weight as it is stored in the end."""
    run(tiny("llama"), tmp_path / "out", ids, GPTQ, tuning=TUNING)
    source, original = PackedSource.open_packed(tmp_path / "out"), Source.open(tiny("llama"))
    from compress.weights.weight import relative_error

    for row in rows_of(tmp_path / "out"):
        weight = original.tensor(f"{row.site}.weight").float()
        decoded = source.compressed(row.site).dequantize()
        assert row.notes["tune/grid"]["weight_error"] == pytest.approx(relative_error(weight, decoded), rel=1e-4)


def test_the_seed_of_the_data_decides_the_order_of_batches(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Twice the same seed gives the same bytes; the order of steps follows the seed, and blocks have orders of their own."""
    from compress.blockwise.view import MethodView

    drawn: dict[str, list[int]] = {}
    real = MethodView.generator

    def recorded(view: MethodView) -> torch.Generator:
        generator = real(view)
        drawn.setdefault(current, []).append(generator.initial_seed())
        return generator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MethodView, "generator", recorded)
        for current, seed in (("a", 0), ("b", 0), ("c", 1)):
            run(tiny("llama"), tmp_path / current, ids, SIGNROUND, data_options={"seed": seed, "samples": 12})
    assert drawn["a"] == drawn["b"]
    assert len(set(drawn["a"])) == 3
    assert not set(drawn["a"]) & set(drawn["c"])
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("offload", [False, True])
def test_hidden_states_are_let_go(offload: bool, tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three sets are alive or on disk at any time: what enters a block, compressed and original, and its targets.

    The one window that is checked in the end does not count.
    """
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = {"alive": 0, "files": 0}
    job = tmp_path / "job"
    real = hidden_states.HiddenStates.__init__

    def counted(self: Any, *args: Any) -> None:
        real(self, *args)
        if sum(samples for samples, _, _ in self.shapes) > 1:
            alive.add(self)

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        gc.collect()
        most["alive"] = max(most["alive"], len(alive))
        files = [path for path in (job / "hidden").glob("*.bin") if ".check." not in path.name]
        most["files"] = max(most["files"], len(files))

    monkeypatch.setattr(hidden_states.HiddenStates, "__init__", counted)
    gc.collect()
    gc.freeze()  # what other tests have left need not be looked through each time
    run(
        tiny("llama", num_hidden_layers=6),
        tmp_path / "out",
        ids,
        SIGNROUND,
        settings=Settings(offload=offload, snapshot_seconds=1e9),
        progress=progress,
        job=job,
    )
    assert most["alive"] == 3
    assert most["files"] <= (6 if offload else 0)
    gc.collect()
    gc.unfreeze()
    assert len(alive) == 0
    shutil.rmtree(job, ignore_errors=True)


def test_tuning_follows_joint_steps_and_steps_of_one_site_in_one_recipe(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Attention alone, then the rest jointly: the joint step sees the attention as it was compressed, tuning sees both."""
    recipe = [
        {**GPTQ[0], "match": "*.self_attn.*"},
        {"match": "*.*", "method": "quant/signround", "options": {"bits": 3, "group_size": 16, "steps": 4}},
    ]
    summary = run(tiny("llama"), tmp_path / "out", ids, recipe, tuning=TUNING)
    assert summary.values["check"]["difference"] < 1e-5
    methods = {row.kind: row.method for row in rows_of(tmp_path / "out")}
    assert set(methods.values()) == {"quant/gptq", "quant/signround"}
    for block in range(3):
        rows = [row for row in rows_of(tmp_path / "out") if row.block == block]
        joint = next(row for row in rows if row.method == "quant/signround")
        assert all("tune/grid" in row.notes for row in rows)
        assert rows[0].notes["tune/grid"]["loss_before"] == pytest.approx(joint.notes["loss"], rel=1e-4)


def test_experts_and_missing_tokens(tiny: Tiny, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.random.default_rng(3).integers(0, 96, (2, 6), dtype=np.int32))
    for name, recipe in (("signround", SIGNROUND), ("newton", NEWTON)):
        run(tiny("mixtral"), tmp_path / name, tmp_path / "few.npy", recipe, tuning=TUNING)
        source = PackedSource.open_packed(tmp_path / name)
        assert all(source.compressed(site).dequantize().isfinite().all() for site in source.table)
        unseen = [row for row in rows_of(tmp_path / name) if "no token" in str(row.fallback)]
        assert unseen
        assert all(row.expert is not None for row in unseen)
