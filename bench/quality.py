"""The table of quality: recipes against models, with size, KL divergence, perplexity and seconds.

    python bench/quality.py --model MODEL [--model ...] --calibration IDS.npy --heldout IDS.npy
        [--recipe NAME_OR_FILE ...] [--method NAME ...] [--bits 4 3 2] [--samples N --seeds 0 1 2] [--jobs 1] [--out results.json]

Without --recipe: each --method (gptq and rtn if none is named; `all` for all) at each of --bits that it has, `plan` being what
`compress quantize --bpw` makes of that budget. Each of --seeds draws --samples of the calibration's windows; what is shown is
the mean over seeds, and `kl_seeds` has each. Every run is a process of its own: `seconds` are what a user waits for,
`processor` those that its threads computed, which other work on the machine (or --jobs N, several runs at a time) changes
little. KL divergence is measured in float32 over all positions but the first of each window, natural logarithm; bits per weight
count all stored bits of the compressed weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.system.files import write_json

PLAN = "plan-"
Steps = dict[str, Any]
HEADS = (
    ("model", 14),
    ("recipe", 22),
    ("bits", 7),
    ("KL", 9),
    ("±", 8),
    ("top-1", 7),
    ("perplexity", 10),
    ("before", 8),
    ("seconds", 8),
    ("processor", 9),
)


def _uniform(method: str, **more: Any) -> Callable[[float], Steps | None]:
    """A method of whole bits with group 128; two and a half are two bits and groups of 32."""

    def steps(bits: float) -> Steps | None:
        if bits == 2.5:
            return step(method, 2, group_size=32, **more)
        return step(method, int(bits), group_size=128, **more) if bits == int(bits) else None

    return steps


def step(method: str, bits: float, **options: Any) -> Steps:
    """One method for all linears in blocks."""
    return {"steps": [{"match": "*.*", "method": method, "options": {"bits": bits, **options}}]}


def _with(steps: Callable[[float], Steps | None], **more: Any) -> Callable[[float], Steps | None]:
    """The same with transforms before it, or tuning after."""

    def both(bits: float) -> Steps | None:
        found = steps(bits)
        return None if found is None else {**found, **more}

    return both


def _table(method: str, names: dict[float, str]) -> Callable[[float], Steps | None]:
    def steps(bits: float) -> Steps | None:
        options = {"datatype": names.get(bits)}
        return {"steps": [{"match": "*.*", "method": method, "options": options}]} if bits in names else None

    return steps


def _spqr(bits: float) -> Steps | None:
    """As many bits per code as go into the size with its grids, of 0.53 bits per weight, and outliers in what is left."""
    stored = bits + 0.125
    return step("quant/spqr", int(stored - 0.54), target_bits=stored) if stored >= 2.54 else None


AWQ = [{"method": "transform/awq"}]
GRID = [{"method": "tune/grid"}]
DRIFT = [{"method": "transform/drift"}]
METHODS: dict[str, Callable[[float], Steps | None]] = {
    "rtn": _uniform("quant/rtn"),
    "gptq": _uniform("quant/gptq"),
    "gptq+tuning": _with(_uniform("quant/gptq"), tuning=GRID, batch_tokens=4096),
    "slim+tuning": lambda bits: {**step("quant/slim", bits, group_size=128), "tuning": GRID, "batch_tokens": 4096},
    "gaussnewton+tuning": lambda bits: _gauss_newton(bits) if bits == int(bits) else None,
    "signround": _uniform("quant/signround"),
    "decoupleq": _with(_uniform("quant/decoupleq"), tuning=GRID),
    "awq+rtn": _with(_uniform("quant/rtn"), transforms=AWQ),
    "awq+gptq": _with(_uniform("quant/gptq"), transforms=AWQ),
    "slim": lambda bits: step("quant/slim", bits, group_size=128),
    "drift+gptq": _with(_uniform("quant/gptq"), transforms=DRIFT),
    "drift+slim": lambda bits: {**step("quant/slim", bits, group_size=128), "transforms": DRIFT},
    "spqr": _spqr,
    "hqq": lambda bits: step("quant/hqq", int(bits), group_size=64) if bits == int(bits) else None,
    "finequant": lambda bits: step("quant/finequant", int(bits)) if bits == int(bits) else None,
    "bipolar": _uniform("quant/bipolar"),
    "bitmod": _table("quant/bitmod", {3: "fp3", 4: "fp4"}),
    "fp4": _table("quant/floating", {4: "fp4"}),
    "nf4": _table("quant/floating", {4: "nf4"}),
    "mxfp4": _table("quant/floating", {4: "mxfp4"}),
    "nvfp4": _table("quant/floating", {4: "nvfp4"}),
}


def _gauss_newton(bits: float) -> Steps:
    tuning = [{"method": "tune/grid", "options": {"epochs": 2, "rate": 0.04 / 2**bits}}]
    return {**step("quant/gaussnewton", int(bits), group_size=128), "batch_tokens": 4096, "tuning": tuning}


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    calibration: Path
    heldout: Path
    samples: int | None
    seeds: list[int]
    device: str


class RunError(Exception):
    """A command failed; the text is the command and what it said."""


def measure(model: Path, recipe: str, given: Setting) -> dict[str, Any] | RunError:
    """Return the row of a recipe, the mean over seeds, or why there is none."""
    try:
        rows = [_measure(model, recipe, given, seed) for seed in given.seeds]
    except RunError as error:
        return error
    mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    name = recipe.removesuffix(".yaml").rpartition("/")[2]
    return {"model": model.name, "recipe": name, **mean, "kl_seeds": [row["kl"] for row in rows]}


def _measure(model: Path, recipe: str, given: Setting, seed: int) -> dict[str, float]:
    """Compress in one process, evaluate in another."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        what = (
            ["quantize", str(model), "--bpw", recipe.removeprefix(PLAN)]
            if recipe.startswith(PLAN)
            else ["run", recipe, str(model)]
        )
        drawn = [] if given.samples is None else ["--samples", str(given.samples), "--seed", str(seed)]
        run = [*what, "-o", str(out), "--data", str(given.calibration), *drawn, "--json", "--device", given.device]
        started = time.perf_counter()
        made, processor = call(*run)
        seconds = time.perf_counter() - started
        options = ["--original", str(model), "--data", str(given.heldout), "--no-speed", "--json", "--device", given.device]
        found, _ = call("eval", str(out), *options)
        shutil.rmtree(out)
    return {
        "bits_per_weight": made["bits_per_compressed_weight"],
        "bytes": made["bytes_after"],
        "kl": found["kl"],
        "kl_standard_error": found["kl_standard_error"],
        "agreement": found["agreement"],
        "perplexity": found["perplexity"],
        "perplexity_before": found["perplexity_before"],
        "seconds": seconds,
        "processor_seconds": processor,
    }


def call(*arguments: str) -> tuple[dict[str, Any], float]:
    """Run a command of compress; return what it prints as JSON, and the processor's seconds that it took."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, "-m", "compress", *arguments], stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if process.returncode:
            raise RunError(f"compress {' '.join(arguments)}\n{err.read()}")
        result: dict[str, Any] = json.load(out)
    return result, used.ru_utime + used.ru_stime


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    cpu = f"{torch.get_num_threads()} threads, {model or platform.processor()}"
    return {"cpu": cpu, "gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    print(
        f"{row['model']:>14} {row['recipe']:>22} {row['bits_per_weight']:>7.3f} {row['kl']:>9.5f} "
        f"{row['kl_standard_error']:>8.5f} {row['agreement']:>7.2%} {row['perplexity']:>10.3f} "
        f"{row['perplexity_before']:>8.3f} {row['seconds']:>8.1f} {row['processor_seconds']:>9.1f}",
        flush=True,
    )


def recipes_of(methods: list[str], bits: list[float], folder: Path) -> list[str]:
    """Write a recipe for each method at each width that it has; a plan is named by its budget."""
    found = []
    for method in [*METHODS, "plan"] if methods == ["all"] else methods:
        for width in bits:
            steps = METHODS[method](width) if method in METHODS else None
            path = folder / f"{method}-{width:g}bit.yaml"
            if steps is not None:
                path.write_text(yaml.safe_dump(steps))
                found.append(str(path))
            elif method == "plan":
                found.append(f"{PLAN}{width:g}")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--method", action="append", default=[], choices=[*METHODS, "plan", "all"])
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if len(arguments.seeds) > 1 and arguments.samples is None:
        parser.error("--seeds: give --samples, fewer than the calibration has: seeds draw windows")
    given = Setting(arguments.calibration, arguments.heldout, arguments.samples, arguments.seeds, arguments.device)
    shown = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])
    result: dict[str, Any] = {"machine": machine(), "command": f"python bench/quality.py {shown}", "rows": []}
    failed: list[RunError] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        methods = arguments.method or ([] if arguments.recipe else ["gptq", "rtn"])
        recipes = arguments.recipe + recipes_of(methods, arguments.bits, Path(folder))
        print(" ".join(name.rjust(width) for name, width in HEADS))
        for row in pool.map(lambda work: measure(work[0], work[1], given), itertools.product(arguments.model, recipes)):
            if isinstance(row, RunError):  # the others are still worth their hours
                failed.append(row)
                print(row, file=sys.stderr, flush=True)
                continue
            result["rows"].append(row)
            show(row)
            if arguments.out:  # after every row: a table takes hours
                write_json(arguments.out, result)
    if failed:
        raise SystemExit(f"{len(failed)} of the recipes failed, see above")


if __name__ == "__main__":
    main()
