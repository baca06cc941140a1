"""All that a GPU has to show, in one command: the tests of kernels, their speed, and whether it is what was asked of them.

    python bench/gpu.py [--out bench/results] [--model CHECKPOINT ...] [--quick] [--only tests,weight_only,...]

Runs `pytest -m cuda tests/kernels/test_cuda.py`, some of it under compute-sanitizer, `bench/tune.py`, then `compress bench` for
weights of 2, 3, 4 and 8 bits, pruned weights, products of integers (W2A8, W4A8, W6A6 and so on, by int8 tensor cores and from
single bits), and each checkpoint given, with generation. Writes one file, OUT/gpu-NAME-DATE.json: GPU, driver, versions, date,
every command with its result, what was asked and what was found. Ends with status 1 where a test failed or a benchmark did not
run; what was asked of the speed is printed and decides nothing.

`--quick`: one small shape and few tokens, to see that all of it runs. `--only`: some of the parts, whose names an unknown one
shows; those of one GPU and one day meet in one file, so that a GPU that is there for minutes at a time does for all of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
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

ROOT = Path(__file__).resolve().parent.parent
SHAPES = "4096x4096,4096x14336,14336x4096,28672x8192"
TOKENS = "1,4,16,64,128,256,2048"


@dataclass(frozen=True)
class Asked:
    """One thing that was asked of the speed."""

    what: str
    wanted: str
    found: str
    holds: bool


def benches(quick: bool) -> dict[str, list[str]]:
    """Return the options of `compress bench` by the name of what they measure."""
    shapes, tokens = ("1024x1024", "1,16") if quick else (SHAPES, TOKENS)
    two = "1024x1024" if quick else "4096x4096,14336x4096"
    few = tokens if quick else "1,4,16,64,256,2048"
    integers = ["--bits", "2,4,6,8", "--group-size", "256", "--activation-bits", "16,8,6,4,2"]
    return {
        "weight_only": ["--shapes", shapes, "--bits", "4,3,2,8", "--tokens", tokens],
        "zeros": ["--shapes", two, "--bits", "4", "--zero", "--tokens", few],
        "two of four": ["--shapes", two, "--bits", "16,4", "--pattern", "2:4", "--tokens", few],
        "single weights": ["--shapes", two, "--bits", "16,4", "--sparsity", "0.5", "--tokens", few],
        "runs of 16": ["--shapes", two, "--bits", "4", "--group-size", "16", "--sparsity", "0.5", "--run", "16", "--tokens", few],
        "integers": ["--shapes", two, *integers, "--tokens", few],
    }


def asked(rows: list[dict[str, Any]]) -> list[Asked]:
    """Compare rows of `compress bench`, those of 4, 3 and 2 bits in groups of 128, with what was asked of an H200."""
    found = []
    of = {(r["out"], r["columns"], r["stored"], r["tokens"]): r for r in rows if r["activation_bits"] == 16}
    for (out, columns, stored, tokens), row in of.items():
        shape = f"{out} x {columns}, {tokens} tokens"
        if stored != "4-bit g128":
            continue
        if tokens == 1 and {out, columns} == {4096, 14336}:
            for share, name in ((0.5, "first milestone"), (0.7, "goal")):
                what = f"{shape}: share of the floor, {name}"
                found.append(Asked(what, f"at least {share:.0%}", f"{row['share']:.0%}", row["share"] >= share))
        if tokens == 1:
            for bits in (2, 3):
                other = of.get((out, columns, f"{bits}-bit g128", 1))
                if other is not None:
                    times = f"{other['microseconds']:.3g} us, 4 bits {row['microseconds']:.3g} us"
                    faster = other["microseconds"] < row["microseconds"]
                    found.append(Asked(f"{shape}: {bits} bits faster than 4", "faster", times, faster))
        if tokens <= 64:
            found.append(Asked(f"{shape}: F.linear over 4 bits", "at least 1", f"{row['gain']:.2f}", row["gain"] >= 1))
        if tokens == 2048:
            found.append(Asked(f"{shape}: F.linear over 4 bits", "at least 0.95", f"{row['gain']:.3f}", row["gain"] >= 1 / 1.05))
    return found


def tests() -> list[str]:
    """Return the command that runs the tests: side by side where pytest-xdist is there, without the one that takes times."""
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") is not None else []
    return [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-k", "not test_speed", *workers, "tests/kernels/test_cuda.py"]


def checks(plans: Path, quick: bool) -> dict[str, list[str]]:
    """Return the commands of parts that are no benchmark of `compress`: where blocks race or leave their arrays, other plans."""
    some = ["-q", "-m", "cuda", "-k", "test_each_weight_by_itself or test_twenty_runs or test_single_weights or test_experts"]
    few = [sys.executable, "-m", "pytest", *some, "tests/kernels/test_cuda.py"]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    tools = {tool: [sanitizer, "--tool", tool, "--error-exitcode", "9", *few] for tool in ("memcheck", "racecheck")}
    sizes = ["--shapes", "1024x1024", "--tokens", "1"] if quick else []
    return tools | {"tune": [sys.executable, "bench/tune.py", *sizes, "--out", str(plans)]}


def chosen(only: str | None, names: list[str]) -> list[str]:
    """Return the parts to run. Raises SystemExit for names that are none."""
    wanted = names if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in wanted if name not in names]:
        raise SystemExit(f"--only {unknown[0]}: expected some of {', '.join(names)}")
    return wanted


def machine() -> dict[str, Any]:
    """Return what figures of this machine have to name. Raises SystemExit where there is no GPU that kernels can use."""
    import torch

    from compress.kernels import _cuda

    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch sees none. This measures kernels on a GPU; `compress bench` measures a CPU")
    where = torch.device("cuda", torch.cuda.current_device())
    if (why := _cuda.obstacle(where)) is not None:
        raise SystemExit(f"kernels cannot run here: {why}")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    packages = {d.name: d.version for d in importlib.metadata.distributions() if d.name.lower().startswith(("cupy", "torch"))}
    capability = ".".join(map(str, torch.cuda.get_device_capability(where)))
    return {"gpu": torch.cuda.get_device_name(where), "capability": capability, "driver": driver, "versions": packages}


def _run(command: list[str]) -> tuple[int, str]:
    """Run a command from the repository, show what it prints, and return its status and the end of it."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    kept: list[str] = []
    if shutil.which(command[0]) is None:
        return 127, f"{command[0]} is not installed"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            kept = [*kept[-39:], line]
    return run.returncode, "".join(kept)


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--model", action="append", default=[], help="a checkpoint that compress wrote")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="parts with commas between them; all of them if not given")
    options = parser.parse_args()
    wanted = benches(options.quick) | {f"model {Path(m).name}": [m] for m in options.model}
    parts = chosen(options.only, ["tests", *checks(options.out, options.quick), *wanted])
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), **machine(), "commands": [], "benches": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-{report['gpu'].replace(' ', '_')}-{report['date']}.json"
    if path.exists():
        report = {**json.loads(path.read_text()), **machine()}
    others = checks(path.with_name(path.name.replace("gpu-", "tune-", 1)), options.quick)
    report["commands"].append(shlex.join(["python", *sys.argv]))

    def keep() -> None:
        path.write_text(json.dumps(report, indent=1) + "\n")  # what is there stays there if a later part fails

    failed = False
    for name in parts:
        if name == "tests":
            status, end = _run(tests())
            report["tests"] = {"command": shlex.join(["pytest", *tests()[3:]]), "status": status, "end": end}
        elif name in others:
            status, end = _run(others[name])
            report[name] = {"command": shlex.join([Path(others[name][0]).name, *others[name][1:]]), "status": status, "end": end}
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "bench.json"
                command = [sys.executable, "-m", "compress", "bench", *wanted[name], "--device", "cuda"]
                status, end = _run([*command, "-o", str(file)])
                found = json.loads(file.read_text()) if status == 0 else {"status": status, "end": end}
                report["benches"][name] = {**found, "command": shlex.join(["compress", *command[3:]])}
        failed = failed or status != 0
        keep()
    judged = asked(report["benches"].get("weight_only", {}).get("rows", []))
    report["asked"] = [asdict(one) for one in judged]
    keep()
    print()
    for one in judged:
        print(f"{'holds ' if one.holds else 'MISSED'}  {one.what}: {one.found} ({one.wanted})")
    for line in report["benches"].get("integers", {}).get("bit_serial", []):
        print(line)
    verdict = {None: "did not run", 0: "passed"}.get(report.get("tests", {}).get("status"), "FAILED")
    print(f"\ntests {verdict}; all of it is in {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
