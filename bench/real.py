"""The table of real activations: methods against models whose channels and tokens differ in size, with other tools in it.

    python bench/real.py --model MODEL [--model ...] [--plant none outliers:40:0 sink:1000:0] [--method NAME ...] [--bits 4 3 2]
        --calibration TEXT --heldout TEXT [--group-size 64] [--peer NAME ... --peers-python PYTHON] [--out results.json] [--table]

A model is a folder. `--plant` makes variants that compute the same function (bench/planted.py): outliers:FACTOR:SEED gives six
channels per norm a larger scale, sink:FACTOR:SEED gives the first token massive activations; windows then begin with that token.
A `--method` is what `compress quantize --method` takes, `default` for nothing, or LABEL=ARGUMENTS of the command, such as
"best=--effort best". A `--peer` is a tool of bench/peers.py and runs in the environment of `--peers-python`, on the same ids.

Calibrated with `--samples` windows of `--length` tokens (64 of 512; fewer tokens where the context is shorter) and measured on
`--windows` (12) of the held-out text, in float32, all positions but the first of each window, natural logarithm. `block bits`
are the stored bits per weight of the linears in blocks, `file bits` those of all tensors over all weights. Every run is a process
of its own: wall and processor seconds and peak memory are those of the whole command. Rows that `--out` has already, of the same
ids, are not measured again but with `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from planted import PLANTS, plant
from quality import machine

from compress.architecture.config import context_length, vocabulary
from compress.calibration.data import fingerprint, load_ids
from compress.checkpoint.source import Source
from compress.recipe.data import Data
from compress.system.files import write_json

HERE = Path(__file__).parent
PEERS = ("llm-compressor", "llm-compressor-awq", "auto-round", "hqq-package", "llama.cpp")
KEY = ("model", "plant", "method", "bits", "group_size", "seed", "calibration", "heldout", "ids")
COLUMNS = (
    ("method", "{method}"),
    ("bits", "{bits:g}"),
    ("block bits", "{block_bits:.3f}"),
    ("file bits", "{file_bits:.3f}"),
    ("KL", "{kl:.5f}"),
    ("±", "{kl_standard_error:.5f}"),
    ("top-1", "{agreement:.1%}"),
    ("perplexity", "{perplexity:.2f}"),
    ("seconds", "{seconds:.0f}"),
    ("processor", "{processor_seconds:.0f}"),
    ("peak memory", "{peak_gigabytes:.2f} GB"),
)


@dataclass(frozen=True)
class Variant:
    """A model of the bench with its windows on disk."""

    name: str
    plant: str
    folder: Path
    calibration: Path  # (samples, length) ids
    heldout: Path
    ids: str  # fingerprint of both


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    variant: Variant
    method: str
    bits: float
    group_size: int
    seed: int
    texts: tuple[str, str]  # names of calibration and held-out text

    def key(self) -> tuple[Any, ...]:
        """What makes a row another row."""
        v = self.variant
        return (v.name, v.plant, self.method, self.bits, self.group_size, self.seed, *self.texts, v.ids)


@dataclass(frozen=True)
class Used:
    """What a process took."""

    seconds: float
    processor_seconds: float
    peak_gigabytes: float


class RunError(Exception):
    """A command failed; the text is the command and what it said."""


def call(command: list[str]) -> tuple[dict[str, Any], Used]:
    """Run a command; return the JSON object that its output ends in, and what it took. Raises RunError."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        said = out.read()
        if process.returncode:
            raise RunError(f"{shlex.join(command)}\n{said[-1000:]}{err.read()[-3000:]}")
    result: dict[str, Any] = json.loads(said[said.index("\n{\n") if "\n{\n" in said else said.index("{") :])
    return result, Used(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9)


def made(model: Path, name: str, arguments: argparse.Namespace, seed: int) -> Variant:
    """Plant what is asked for and draw the windows, unless an earlier run has left them."""
    work: Path = arguments.work
    folder = model if name == "none" else work / f"{model.name}-{name.replace(':', '-')}"
    if not folder.is_dir():
        plant(model, folder, name)
    source = Source.open(folder)
    context = context_length(source) or arguments.length
    drawn = []
    for text, count in ((arguments.calibration, arguments.samples), (arguments.heldout, arguments.windows)):
        length = min(arguments.length, context)
        ids = load_ids(Data(name=text, samples=count, length=length, seed=seed), folder, vocabulary(source), context)
        if name.startswith("sink"):  # the sink stands in front, and nowhere else
            bos = int(source.config["bos_token_id"])
            ids[ids == bos] = (bos + 1) % vocabulary(source)
            ids[:, 0] = bos
        drawn.append(ids)
    stem = f"{folder.name}-{seed}-{fingerprint(drawn[0])[:6]}{fingerprint(drawn[1])[:6]}"
    paths = [work / f"{stem}-{kind}.npy" for kind in ("calibration", "heldout")]
    for path, ids in zip(paths, drawn, strict=True):
        np.save(path, ids.numpy().astype(np.int32))
    return Variant(model.name, name, folder, *paths, ids=stem.rpartition("-")[2])


def measured(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress in one process, evaluate in another; return the row. Raises RunError."""
    v = task.variant
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        out = Path(folder) / "out"
        found, used = call(_peer(task, out, arguments) if task.method in PEERS else _ours(task, out))
        checkpoint = Path(found.get("checkpoint", out))
        bits = found if "block_bits" in found else _bits(checkpoint, v.folder)
        how = ["--original", str(v.folder), "--data", str(v.heldout), "--no-speed", "--json"]
        judged, _ = call([sys.executable, "-m", "compress", "eval", str(checkpoint), *how])
        shutil.rmtree(out, ignore_errors=True)
    values = {key: judged[key] for key in ("kl", "kl_standard_error", "agreement", "perplexity", "perplexity_before")}
    sizes = {"block_bits": bits["block_bits"], "file_bits": bits["file_bits"]}
    stamp = {"commit": _commit(), "date": time.strftime("%Y-%m-%d")}
    return dict(zip(KEY, task.key(), strict=True)) | values | sizes | asdict(used) | stamp


def _ours(task: Task, out: Path) -> list[str]:
    label, given, more = task.method.partition("=")
    method = shlex.split(more) if given else [] if label == "default" else ["--method", label]
    sizes = ["--bits", f"{task.bits:g}", "--group-size", str(task.group_size)]
    if {"--bpw", "--size", "--max-kl", "--recipe"} & {*method}:
        sizes = []
    data = ["--data", str(task.variant.calibration)]
    command = [sys.executable, "-m", "compress", "quantize", str(task.variant.folder), "-o", str(out)]
    return [*command, *sizes, *data, *(word.replace("{bits}", f"{task.bits:g}") for word in method), "--json"]


def _peer(task: Task, out: Path, arguments: argparse.Namespace) -> list[str]:
    script, python = str(HERE / "peers.py"), str(arguments.peers_python or sys.executable)
    given = [str(task.variant.folder), str(out), str(task.variant.calibration)]
    command = [
        python,
        script,
        task.method,
        *given,
        f"{task.bits:g}",
        str(task.group_size),
        "--iterations",
        str(arguments.iterations),
    ]
    return (
        command
        if arguments.llama_cpp is None
        else [*command, "--llama-cpp", str(arguments.llama_cpp), "--work", str(arguments.work)]
    )


def _bits(checkpoint: Path, original: Path) -> dict[str, float]:
    """Stored bits per weight of the linears in blocks, and of the whole file, from the headers."""
    before, after = Source.open(original), _headers(checkpoint)
    linears = [e for name, e in before.entries.items() if name.endswith(".weight") and len(e.shape) > 1 and ".layers." in name]
    owners = {entry.name.removesuffix(".weight") for entry in linears}
    inside = sum(size for name, size in after.items() if name.rpartition(".")[0] in owners and not name.endswith(".bias"))
    return {"block_bits": inside * 8 / sum(e.numel for e in linears), "file_bits": sum(after.values()) * 8 / before.numel}


def _headers(checkpoint: Path) -> dict[str, int]:
    """Bytes of each tensor of a folder of safetensors."""
    sizes = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sizes |= {name: v["data_offsets"][1] - v["data_offsets"][0] for name, v in header.items() if name != "__metadata__"}
    return sizes


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, a table for each model and held-out text, best divergence of each width first."""
    lines = []
    titles = dict.fromkeys((row["model"], row["plant"], row["heldout"], row["group_size"]) for row in rows)
    for title in titles:
        mine = [row for row in rows if (row["model"], row["plant"], row["heldout"], row["group_size"]) == title]
        model, planted, text, group = title
        with_plant = "" if planted == "none" else f" with {planted}"
        lines += [
            f"\n**{model}{with_plant}**, groups of {group}, measured on {text}, perplexity {mine[0]['perplexity_before']:.2f}\n"
        ]
        lines += ["| " + " | ".join(head for head, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for row in sorted(mine, key=lambda row: (-row["bits"], row["kl"])):
            shown = row | {"method": row["method"].partition("=")[0]}
            lines.append("| " + " | ".join(form.format(**shown) for _, form in COLUMNS) + " |")
    return "\n".join(lines)


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--plant", nargs="+", default=["none"], help=f"none, or {', '.join(PLANTS)} with :FACTOR:SEED")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--peer", action="append", default=[], choices=PEERS)
    parser.add_argument("--peers-python", type=Path, help="Python of an environment that has the tools")
    parser.add_argument("--iterations", type=int, default=200, help="steps of auto-round per block")
    parser.add_argument("--llama-cpp", type=Path, help="a script CHECKPOINT WORK TYPE that writes WORK/TYPE.gguf")
    parser.add_argument("--bits", type=float, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="")
    parser.add_argument("--heldout", default="")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "compress-real", help="planted models, windows"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "real.json")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown, and measure nothing")
    return parser


def main() -> None:
    """Measure the rows that are missing."""
    parser = options()
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rows": []}
    if arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.table:
        print(table(result["rows"]))
        return
    if not (arguments.model and arguments.calibration and arguments.heldout):
        parser.error("--model, --calibration and --heldout: give all three, or --table")
    result["machine"] = machine()
    arguments.work.mkdir(parents=True, exist_ok=True)
    failed = 0
    for model in arguments.model:
        for name in arguments.plant:
            for seed in arguments.seeds:
                variant = made(model, name, arguments, seed)
                texts = (Path(arguments.calibration).name, Path(arguments.heldout).name)
                for bits in arguments.bits:
                    for method in [*arguments.method, *arguments.peer] or ["default"]:
                        failed += not add(Task(variant, method, bits, arguments.group_size, seed, texts), result, arguments)
    if failed:
        raise SystemExit(f"{failed} of the rows failed, see above")


def add(task: Task, result: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Measure a row unless it is there, print and save it; False if its command failed; the others are worth their hours."""
    there = [row for row in result["rows"] if tuple(row[key] for key in KEY) == task.key()]
    if there and not arguments.again:
        row = there[0]
    else:
        try:
            row = measured(task, arguments)
        except RunError as error:
            print(error, file=sys.stderr, flush=True)
            return False
        result["rows"] = [other for other in result["rows"] if other not in there] + [row]
        write_json(arguments.out, result)
    print(row["model"], row["plant"], "  ".join(f"{head} {form.format(**row)}" for head, form in COLUMNS), flush=True)
    return True


if __name__ == "__main__":
    main()
