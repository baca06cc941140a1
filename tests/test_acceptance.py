"""What users of compression tools complain about most, as tests; tests/README.md says where each complaint is answered."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import command
from places import ROOT
from runs import compress as run
from runs import digests, killed_at, steps
from thorough import some
from written import OFFLINE, no_network

from compress import registry
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.tensor_file import read_header

Tiny = Callable[..., Path]
KINDS = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", ["*.gate_proj", "*.w1"], ["*.up_proj", "*.w3"], ["*.down_proj", "*.w2"]]
SMALL = {
    "group_size": 16,
    "group": 16,
    "pattern": "2:4",
    "bits": 3,
    "steps": 3,
    "sparsity": 0.5,
    "epochs": 1,
    "rank": 2,
    "rounds": 1,
}

_NOT = {("bits", "prune"), ("pattern", "prune"), ("group", "retrain")}


def options(folder: str, name: str) -> dict[str, Any]:
    """Options of a method that suit tiny models, as far as it has them; pruned weights stay as they are."""
    found = registry.lookup(folder, name).model_fields
    return {k: v for k, v in SMALL.items() if k in found and (k, folder) not in _NOT}


def recipes() -> dict[str, dict[str, Any]]:
    """Recipes in which together every method that there is has weights: methods that see one weight share a few."""
    single = []
    found: dict[str, dict[str, Any]] = {}
    for folder in ("quant", "prune"):
        for name in registry.names(folder):
            path = f"{folder}/{name}"
            if registry.lookup(folder, name).scope == "site":
                single.append({"method": path, "options": options(folder, name)})
            else:
                found[path] = {"steps": [{"match": "*.*", "method": path, "options": options(folder, name)}]}
    for start in range(0, len(single), len(KINDS)):
        members = single[start : start + len(KINDS)]
        taken = [{"match": match, **step} for match, step in zip(KINDS, members, strict=False)]
        found[" ".join(step["method"] for step in members)] = {"steps": taken}
    for folder, place in (("transform", "transforms"), ("tune", "tuning"), ("retrain", "tuning")):
        for name in registry.names(folder):
            path = f"{folder}/{name}"
            base = "prune/magnitude" if name in ("perp", "ast") else "quant/gptq"
            step = {"match": "*.*", "method": base, "options": options(*base.split("/"))}
            found[path] = {"steps": [step], place: [{"method": path, "options": options(folder, name)}]}
    return found


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be, since these tests wait for many fsyncs."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


# --- 1: killed and run again


def test_every_method_is_in_a_recipe_here() -> None:
    said = " ".join(recipes())
    for folder in ("quant", "prune", "transform", "tune", "retrain"):
        assert all(f"{folder}/{name}" in said for name in registry.names(folder))


def runs() -> Iterator[tuple[str, str]]:
    """Methods on a dense model and on one with experts; what goes before or after a method on one of them in turn."""
    both = ("llama", "mixtral")
    for number, (name, values) in enumerate(recipes().items()):
        yield from ((name, family) for family in (both if len(values) == 1 else both[number % 2 :][:1]))


def once() -> Iterator[tuple[str, str]]:
    """Every method once, on either model in turn."""
    places = dict[str, list[str]]()
    for name, family in runs():
        places.setdefault(name, []).append(family)
    yield from ((name, families[number % len(families)]) for number, (name, families) in enumerate(places.items()))


@pytest.mark.parametrize(("name", "family"), some(runs(), *once()))
def test_killed_and_run_again_with_every_method(
    name: str, family: str, forks: Any, tiny: Tiny, ids: Path, tmp_path: Path
) -> None:
    """Killed at a random durable step, in a process of its own, then finished here: the bytes of an uninterrupted run."""
    values = recipes()[name]
    model = tiny(family, num_hidden_layers=2)
    said = run(model, tmp_path / "whole", ids, **values).values
    if said["predicted"]["exact"]:
        assert said["predicted"]["bytes_after"] == said["bytes_after"]
    event = random.Random(name + family).randrange(4, 16)
    more = {key: value for key, value in values.items() if key != "steps"}
    process = forks.Process(target=killed_at, args=(event, model, tmp_path / "out", ids, values["steps"], more))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out", ids, **values)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


# --- 3: experts without tokens


def test_all_experts_own_the_same_tensors(tiny: Tiny, tmp_path: Path) -> None:
    """Also those that no token reached, for which runtimes look all the same."""
    np.save(tmp_path / "one.npy", np.full((1, 2), 5, dtype=np.int32))
    run(tiny("mixtral"), tmp_path / "out", tmp_path / "one.npy", steps(bits=3, group_size=16))
    leaves: dict[str, set[str]] = {}
    for name in PackedSource.open_packed(tmp_path / "out").packed:
        if found := re.search(r"(layers\.\d+\.block_sparse_moe\.experts\.\d+)\.(.*)", name):
            leaves.setdefault(found[1], set()).add(found[2])
    assert len(leaves) == 12
    assert len({frozenset(names) for names in leaves.values()}) == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    unseen = {(row["block"], row["expert"]) for row in rows if row["expert"] is not None and row["tokens"] == 0}
    assert unseen and all(row["fallback"] for row in rows if (row["block"], row["expert"]) in unseen)
    assert f"No calibration token reached {len(unseen)} experts" in (tmp_path / "out" / "report.html").read_text()


# --- 7 and 8: with and without the package


LOGITS = """
import sys, torch, numpy
if sys.argv[3] == "native": import compress
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error(); logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad(): numpy.save(sys.argv[2], model(torch.arange(24).reshape(2, 12), use_cache=False).logits.numpy())
"""


def python(code: str, *arguments: object, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_fresh_interpreter_gives_the_logits_of_the_decoded_weights(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Bit for bit, of the result and of its export, which is read without compress. The decoded model is a dense checkpoint."""
    from safetensors.torch import save_file

    from compress.interop import exporter as exporting

    run(tiny("llama"), tmp_path / "native", ids, steps(bits=3, group_size=16), dtype="float32")
    source = PackedSource.open_packed(tmp_path / "native")
    decoded = tmp_path / "decoded"
    decoded.mkdir()
    save_file(
        {name: source.tensor(name).contiguous() for name in source.entries}, decoded / "model.safetensors", {"format": "pt"}
    )
    (decoded / "config.json").write_text(json.dumps(source.config))
    exporting.export(
        exporting.prepare(str(tmp_path / "native"), "compressed-tensors"), tmp_path / "compressed-tensors", lambda *_: None
    )
    found = {}
    for kind in ("decoded", "native", "compressed-tensors"):
        done = python(LOGITS, tmp_path / kind, tmp_path / f"{kind}.npy", kind)
        assert done.returncode == 0, done.stderr
        found[kind] = np.load(tmp_path / f"{kind}.npy")
    assert np.array_equal(found["native"], found["decoded"])
    assert np.array_equal(found["compressed-tensors"], found["decoded"])


def test_without_the_package_it_fails_and_doctor_says_why(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where what stops other programs was taken out of config.json, that is said too."""
    out = tmp_path / "out"
    run(tiny("llama", num_hidden_layers=1), out, None, steps("quant/rtn", bits=4, group_size=16))
    done = python(LOGITS, out, tmp_path / "x.npy", "plain", path=tmp_path)
    assert done.returncode != 0 and "import-compress-first" in done.stderr
    assert command(monkeypatch, capsys, "doctor", out, "-q").code == 0
    done = command(monkeypatch, capsys, "doctor", out, "-q", "--without-import")
    code, said = done.code, done.text
    assert code == 9 and "put that line before from_pretrained" in said
    config = json.loads((out / "config.json").read_text())
    del config["transformers_weights"]
    (out / "config.json").write_text(json.dumps(config))
    assert "only an empty tensor stops programs" in command(monkeypatch, capsys, "doctor", out, "-q").text
    del config["quantization_config"]["guard"]
    (out / "config.json").write_text(json.dumps(config))
    done = command(monkeypatch, capsys, "doctor", out, "-q")
    code, said = done.code, done.text
    assert code == 9 and "nothing stops programs" in said


# --- 9: mixed bits of siblings


def test_mixed_siblings_are_refused_for_vllm_and_pass_for_ours(
    tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mixed.yaml"
    low, high = ({"bits": bits, "group_size": 32} for bits in (4, 8))
    made = [
        {"match": "*.q_proj", "method": "quant/rtn", "options": high},
        {"match": "*.*", "method": "quant/rtn", "options": low},
    ]
    recipe.write_text(json.dumps({"steps": made}))
    model = tiny("llama", num_hidden_layers=1)
    arguments = ("run", recipe, model, "-o", tmp_path / "out", "--device", "cpu", "-q", "--no-reload")
    done = command(monkeypatch, capsys, *arguments, "--target", "vllm")
    code, said = done.code, done.text
    assert code == 2 and "q_proj" in said and not (tmp_path / "out").exists()
    assert command(monkeypatch, capsys, *arguments).code == 0


# --- 10: offline


def test_processes_of_the_documentation_have_no_network() -> None:
    """The commands of the quick start and of all other pages run in such processes (tests/test_docs.py)."""
    code = """
    import socket
    for call in (lambda: socket.create_connection(("192.0.2.1", 80)), lambda: socket.create_connection(("huggingface.co", 443))):
        try:
            call()
        except OSError as error:
            assert "no network in this process" in str(error), error
        else:
            raise AssertionError("connected")
    """
    done = python(code, path=OFFLINE)
    assert done.returncode == 0, done.stderr
    with no_network(), pytest.raises(socket.gaierror, match="no network in this process"):
        socket.create_connection(("example.org", 80))


# --- 11: help


def test_help_of_every_command_takes_less_than_half_a_second() -> None:
    """In processor time of a process of its own, the start of Python and all imports included; without torch."""
    code = """
    import contextlib, io, json, sys, time
    from compress import cli
    import typer.main
    names = list(typer.main.get_command(cli.app).commands)
    started, taken = time.process_time(), {}
    for name in names:
        before = time.process_time()
        sys.argv = ["compress", name, "--help"]
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            cli.main()
        assert name in text.getvalue()
        taken[name] = started + time.process_time() - before
    assert "torch" not in sys.modules
    print(json.dumps(taken))
    """
    found: dict[str, float] = {}
    for _ in range(3):
        done = python(code)
        assert done.returncode == 0, done.stderr
        found = {name: min(value, found.get(name, 9.0)) for name, value in json.loads(done.stdout).items()}
    assert len(found) > 15
    assert max(found.values()) < 0.5, found


# --- 13: no room


def limited(limit: int, *arguments: Any) -> None:
    """Run a recipe in a process whose files may have so many bytes: the one that would be longer is cut off there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    killed_at(0, *arguments)


@pytest.mark.parametrize("limit", [9_000, 15_000, 40_000])
def test_a_file_that_finds_no_room_leaves_no_half_a_file(limit: int, forks: Any, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """No file under its final name is cut off, wherever it is, and the same command goes on once there is room."""
    arguments = (tiny("llama"), tmp_path / "out", ids, steps(bits=3, group_size=16), {})
    process = forks.Process(target=limited, args=(limit, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 1, "it must have failed, by an error"
    assert not (tmp_path / "out").exists()
    for path in (tmp_path / "out.job").rglob("*.safetensors"):
        read_header(path)  # refuses a file that ends early
    for path in (tmp_path / "out.job").rglob("*.json"):
        json.loads(path.read_text())
    run(*arguments[:4])
    run(tiny("llama"), tmp_path / "whole", ids, arguments[3])
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


# --- the table


def test_the_table_of_acceptance_names_tests_that_there_are() -> None:
    text = (ROOT / "tests" / "README.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rows] == list(range(1, 15))
    for line in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", line)
        assert named
        for file, test in named:
            assert re.search(rf"^def {test}\b", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE), (file, test)
