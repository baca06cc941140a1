"""Killed at any moment and run again, a job gives the bytes of an uninterrupted run, and never a half checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import compress as run
from runs import digests, ids_file, killed_at, steps
from thorough import times

from compress.checkpoint.source import Source
from compress.errors import CalibrationError, CheckpointError, OutputError, ResumeError
from compress.runs.pipeline import Settings

Tiny = Callable[..., Path]
GPTQ = steps(bits=3, group_size=16)
# Each kind of job: with and without hidden states on disk, several passes, several shards.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama offloaded": ("llama", {"settings": Settings(offload=True)}),
    "llama snapshots": ("llama", {"settings": Settings(snapshot_seconds=0.0)}),
    "mixtral in passes": ("mixtral", {"settings": Settings(memory=60_000), "max_shard_size": "40KB"}),
}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: these tests wait for thousands of fsyncs, and a disk that others use makes them slow."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def start(forks: Any, event: int, *arguments: Any) -> Any:
    process = forks.Process(target=killed_at, args=(event, *arguments))
    process.start()
    return process


def whole_or_absent(out: Path) -> None:
    """Under the final name there is a checkpoint that opens and has a summary, or nothing."""
    if out.exists():
        assert Source.open(out).entries and json.loads((out / "summary.json").read_text())["tool"] == "compress"


@pytest.mark.parametrize("kind", JOBS)
def test_killed_at_each_durable_step(kind: str, forks: Any, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    family, more = JOBS[kind]
    arguments = (tiny(family), ids, GPTQ, more)
    model, data, recipe, more = arguments
    reference = tmp_path / "reference"
    process = start(forks, 0, model, reference, data, recipe, more)
    process.join()
    expected, events = digests(reference), int((tmp_path / "reference.events").read_text())
    assert events > 20
    generator = random.Random(kind)
    for event in sorted(generator.sample(range(1, events + 1), times(6, 24))):
        out = tmp_path / f"killed-{event}"
        process = start(forks, event, model, out, data, recipe, more)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        whole_or_absent(out)
        process = start(forks, 0, model, out, data, recipe, more)
        process.join()
        assert process.exitcode == 0
        assert digests(out) == expected, f"killed at durable step {event} of {events}"
        assert not out.with_name(out.name + ".job").exists()


def test_killed_again_and_again_at_random_moments(forks: Any, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    more = {"settings": Settings(snapshot_seconds=0.05)}
    began = time.monotonic()
    process = start(forks, 0, tiny("llama"), tmp_path / "reference", ids, GPTQ, more)
    process.join()
    whole = time.monotonic() - began
    expected = digests(tmp_path / "reference")
    generator = random.Random(0)
    kills = attempt = 0
    while kills < times(6, 20):
        attempt += 1
        out = tmp_path / f"out-{attempt}"
        for _ in range(3):
            process = start(forks, 0, tiny("llama"), out, ids, GPTQ, more)
            time.sleep(generator.uniform(0, whole))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            whole_or_absent(out)
        process = start(forks, 0, tiny("llama"), out, ids, GPTQ, more)
        process.join()
        assert process.exitcode == 0
        assert digests(out) == expected
        assert attempt < 60, "most attempts must be killed on the way for the test to mean something"


def interrupted(model: Path, out: Path, data: Path, **more: Any) -> None:
    """Run until the second block begins."""

    class Stop(Exception):
        pass

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if block == 2:
            raise Stop

    with pytest.raises(Stop):
        run(model, out, data, GPTQ, progress=progress, **more)


def test_finished_blocks_are_not_done_again(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    interrupted(tiny("llama"), tmp_path / "out", ids)
    seen: set[tuple[int, str]] = set()
    run(tiny("llama"), tmp_path / "out", ids, GPTQ, progress=lambda block, blocks, step, share: seen.add((block, step)))
    assert (2, "compressing") in seen
    assert {block for block, step in seen if step == "compressing"} == {2}
    assert {block for block, step in seen if step == "replaying"} == {0, 1}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steps": steps(bits=4, group_size=16)}, r"recipe\.steps\.0\.options\.bits was 3 and is 4"),
        ({"steps": steps("quant/rtn", bits=3, group_size=16)}, r"recipe\.steps\.0\.method"),
        ({"data_options": {"seed": 7}}, r"recipe\.data\.seed was 0 and is 7"),
        ({"dtype": "bfloat16"}, r"recipe\.dtype"),
        ({"batch_tokens": 32}, r"recipe\.batch_tokens"),
    ],
)
def test_a_changed_recipe_names_the_field(change: dict[str, Any], field: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    interrupted(tiny("llama"), tmp_path / "out", ids)
    arguments = {"steps": GPTQ, **change}
    with pytest.raises(ResumeError, match=field):
        run(tiny("llama"), tmp_path / "out", ids, **arguments)


def test_a_changed_source_or_text_is_named(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    data = Path(shutil.copy(ids, tmp_path / "ids.npy"))
    interrupted(model, tmp_path / "out", data)
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(ResumeError, match=r"source\.model\.safetensors"):
        run(model, tmp_path / "out", data, GPTQ)
    ids_file(data, seed=5)
    with pytest.raises(ResumeError, match=r"source.*(and 1 more: calibration)"):
        run(model, tmp_path / "out", data, GPTQ)


def test_a_damaged_part_is_found_before_anything_is_built_on_it(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    interrupted(tiny("llama"), tmp_path / "out", ids)
    part = next((tmp_path / "out.job" / "parts").glob("block-00001*"))
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"block-00001.*changed since it was written"):
        run(tiny("llama"), tmp_path / "out", ids, GPTQ)


@pytest.mark.parametrize("settings", [Settings(offload=True), Settings(snapshot_seconds=0.0)], ids=["offloaded", "stored"])
def test_a_flipped_bit_of_hidden_states_means_that_blocks_are_replayed(
    settings: Settings, tiny: Tiny, ids: Path, tmp_path: Path
) -> None:
    run(tiny("llama"), tmp_path / "reference", ids, GPTQ)
    interrupted(tiny("llama"), tmp_path / "out", ids, settings=settings)
    states = sorted((tmp_path / "out.job" / "hidden").glob("after-00001.calibration.*"))
    assert states
    raw = bytearray(states[0].read_bytes())
    raw[len(raw) // 2] ^= 64
    states[0].write_bytes(raw)
    seen: set[tuple[int, str]] = set()
    run(
        *(tiny("llama"), tmp_path / "out", ids, GPTQ),
        settings=settings,
        progress=lambda block, blocks, step, share: seen.add((block, step)),
    )
    assert {block for block, step in seen if step == "replaying"} == {0, 1}
    assert digests(tmp_path / "out") == digests(tmp_path / "reference")


@pytest.mark.parametrize("line", [b"[1]\n", b'{"block": "a"}\n', b'{"block": 1, "strange": 2}\n', b'{"block": 1, "parts": []}\n'])
def test_a_line_of_the_journal_that_is_no_record_is_as_good_as_torn(line: bytes, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    interrupted(tiny("llama"), tmp_path / "out", ids)
    journal = tmp_path / "out.job" / "journal.jsonl"
    first = journal.read_bytes().splitlines(keepends=True)[0]
    journal.write_bytes(first + line)
    seen: set[tuple[int, str]] = set()
    run(tiny("llama"), tmp_path / "out", ids, GPTQ, progress=lambda block, blocks, step, share: seen.add((block, step)))
    assert {block for block, step in seen if step == "compressing"} == {1, 2}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_source_that_is_rewritten_meanwhile_is_noticed(name: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    last = "checking" if name == "config.json" else "compressing"  # of the last block, after which copied tensors are read

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if step == last and block >= 2:
            path = model / name
            path.write_bytes(path.read_bytes().replace(b'"rms_norm_eps"', b'"rms_norm_epz"'))
            os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match=f"{name}: was changed"):
        run(model, tmp_path / "out", ids, GPTQ, progress=progress)
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_job_folder_are_refused(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if (block, step) == (1, "compressing"):
            with pytest.raises(ResumeError, match="another run is at work"):
                run(tiny("llama"), tmp_path / "out", ids, GPTQ)

    run(tiny("llama"), tmp_path / "out", ids, GPTQ, progress=progress)


def test_a_folder_that_is_not_ours_is_left_alone(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a checkpoint that compress wrote"):
        run(tiny("llama"), tmp_path / "out", ids, GPTQ)
    with pytest.raises(OutputError, match=r"thesis\.tex.*not a job folder"):
        run(tiny("llama"), tmp_path / "fresh", ids, GPTQ, job=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["thesis.tex"]


def test_a_finished_result_is_kept_and_another_job_is_refused(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    run(tiny("llama"), tmp_path / "out", ids, GPTQ)
    before = digests(tmp_path / "out")
    assert run(tiny("llama"), tmp_path / "out", ids, GPTQ).resumed
    with pytest.raises(ResumeError, match=r"bits was 3 and is 2"):
        run(tiny("llama"), tmp_path / "out", ids, steps(bits=2, group_size=16))
    assert digests(tmp_path / "out") == before


def test_a_full_disk_leaves_nothing_under_the_final_name(
    tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny("llama"), tmp_path / "reference", ids, GPTQ)
    real = os.fsync

    for allowed in (3, 9, 20, 30):
        left = allowed
        shutil.rmtree(tmp_path / "out.job", ignore_errors=True)

        def fsync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"cannot be written: the disk is full; free some space"):
            run(tiny("llama"), tmp_path / "out", ids, GPTQ)
        monkeypatch.setattr(os, "fsync", real)
        whole_or_absent(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    run(tiny("llama"), tmp_path / "out", ids, GPTQ)
    assert digests(tmp_path / "out") == digests(tmp_path / "reference")


def test_a_disk_that_is_too_small_is_seen_before_the_run(
    tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"1.00 kB free; a run needs about"):
        run(tiny("llama"), tmp_path / "out", ids, GPTQ)
    assert not any(p.name.startswith("out") for p in tmp_path.iterdir())


def test_a_weight_that_is_not_finite_is_named(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 2048 values are NaN or infinite"):
        run(model, tmp_path / "out", ids, GPTQ)
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_an_error_before_the_job_begins(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="12"):
        run(tiny("llama"), tmp_path / "out", ids, GPTQ, data_options={"samples": 400})
    assert not any(p.name.startswith("out") for p in tmp_path.iterdir())
