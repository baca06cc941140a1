"""The bytes that every shipped recipe and every way to a checkpoint gives, as digests, to compare two states of the code.

    python bench/bytes.py examples/demo -o before.json                      # in a checkout of the state before
    python bench/bytes.py examples/demo -o after.json --against before.json # exit code 1 where a digest differs

Digests depend on the versions of torch and on the processor, so they are compared on one machine. Each case is a process of its
own, with one thread; `--moe MODEL` adds the cases that need a model with experts, `--only GLOB` takes some.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples/demo/calibration.jsonl"
HELD_OUT = ROOT / "examples/demo/evaluation.jsonl"
TIMES = ("seconds", "peak", "time", "speed", "tokens_per_second", "memory", "predicted")  # words in keys of what a clock says


GPTQ = "run gptq-3bit MODEL -o OUT FEW"
MORE = {
    "inputs original": f"{GPTQ} --set inputs=original",
    "inputs original, cached twice": f"{GPTQ} --set inputs=original --cache OUT.cache + "
    "run spqr-3.5bit MODEL -o OUT.second FEW --set inputs=original --cache OUT.cache",
    "cached": f"{GPTQ} --cache OUT.cache + run gptq-3bit MODEL -o OUT.second FEW --cache OUT.cache",
    "watched": f"{GPTQ} --watch 2",
    "offloaded": "run drift-gptq-3bit MODEL -o OUT FEW --offload --watch 2",
    "two ranks": f"--ranks {GPTQ}",
    "two ranks, whole blocks": "--ranks run gptq-2bit-tuned MODEL -o OUT FEW",
    "two ranks, drift, original": "--ranks run drift-gptq-3bit MODEL -o OUT FEW",
    "head": f"{GPTQ} --set steps.0.match=*",
    "quantize --bpw": "quantize MODEL -o OUT --bpw 3.0 FEW",
    "quantize asymmetric": "quantize MODEL -o OUT --bits 4 --asymmetric FEW",
    "plan": "plan MODEL --bpw 3.0 -o OUT/plan.yaml SHORT -q --check",
    "prune owl": "prune MODEL -o OUT --sparsity 0.6 --distribute owl FEW",
    "prune global": "prune MODEL -o OUT --sparsity 0.6 --distribute global FEW",
    "prune measured": "prune MODEL -o OUT --sparsity 0.6 --distribute measured FEW",
    "prune and retrain": "prune MODEL -o OUT --sparsity 0.6 --retrain perp FEW",
    "prune 2:4 and quantize": "prune MODEL -o OUT --pattern 2:4 --bits 4 FEW",
    "retrain": f"{GPTQ} + retrain OUT -o OUT.second SHORT --no-reload -q",
    "cut channels": "cut MODEL -o OUT --channels 0.25 SHORT -q",
    "cut channels uneven": "cut MODEL -o OUT --channels 0.25 --uneven SHORT -q",
    "cut channels mixed": "cut MODEL -o OUT --channels 0.25 --score mixed --rounds 2 SHORT -q",
    "cut heads": "cut MODEL -o OUT --heads 0.25 SHORT -q",
    "cut blocks": "cut MODEL -o OUT --blocks 1 SHORT -q",
    "sweep": "sweep MODEL --method magnitude --sparsity 0:0.8:0.4 SHORT -o OUT --json -q",
    "exports": "run rtn-4bit MODEL -o OUT --no-reload -q --format compressed-tensors --format gptq --format awq --format gguf "
    "--format dense",
    "eval": f"{GPTQ} + eval OUT --original MODEL --data {HELD_OUT} --samples 4 --length 128 --no-speed --json",
    "bisect": f"{GPTQ} + bisect OUT MODEL SHORT --json",
    "inspect": f"{GPTQ} + inspect OUT --json",
    "doctor": f"{GPTQ} + doctor OUT --json",
}
EXPERTS = {
    f"experts, recipe {name}": f"run {name} MOE -o OUT FEW"
    for name in [
        "moe-4bit-experts-3bit",
        "gptq-3bit",
        "drift-gptq-3bit",
        "awq-4bit",
        "slim-2bit",
        "signround-2bit",
        "permute-ria-2of4",
    ]
} | {
    "experts, quantize --bpw": "quantize MOE -o OUT --bpw 3.0 FEW",
    "experts, cut": "cut MOE -o OUT --experts 0.25 SHORT -q",
    "experts, prune and retrain": "prune MOE -o OUT --sparsity 0.5 --retrain perp FEW",
}


def cases(model: str, moe: str | None) -> dict[str, str]:
    """Return command lines by name; OUT is put in later, ` + ` separates commands of one case."""
    short = f"--data {DATA} --samples 8 --length 128"
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if "experts" not in path.stem)
    found = {f"recipe {name}": f"run {name} MODEL -o OUT FEW" for name in recipes} | MORE | (EXPERTS if moe else {})
    words = {"FEW": f"{short} --no-reload -q", "SHORT": short, "MODEL": model, "MOE": moe or ""}
    return {name: re.sub("|".join(words), lambda word: words[word[0]], text) for name, text in found.items()}


def untimed(value: object) -> object:
    """A JSON value without what a clock or the machine's memory says."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if not any(word in key for word in TIMES)}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def digests(folder: Path, printed: list[str]) -> dict[str, str]:
    """Digests of what decides the result: weights, configs, recipes, plans, rows and what was printed as JSON."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, raw = str(path.relative_to(folder)), b""
        if ".cache" in name or path.is_dir():
            continue
        if path.suffix in (".safetensors", ".gguf", ".yaml") or path.name in ("config.json", "quantize_config.json"):
            raw = path.read_bytes()
        elif path.suffix == ".jsonl":
            raw = json.dumps([untimed(json.loads(line)) for line in path.read_text().splitlines()]).encode()
        else:
            continue
        found[name] = hashlib.sha256(raw.replace(str(folder).encode(), b"")).hexdigest()[:16]
    for number, text in enumerate(printed):
        if text.startswith(("{", "[")):
            plain = json.dumps(untimed(json.loads(text))).replace(str(folder), "")
            found[f"printed {number}"] = hashlib.sha256(plain.encode()).hexdigest()[:16]
    return found


def run(name: str, commands: str) -> tuple[str, dict[str, str], float]:
    """Run a case in a folder of its own; what went wrong is the digest then."""
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="bytes-"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    printed, failed = [], {}
    for command in commands.split(" + "):
        argv = command.replace("OUT", str(folder / "out")).split(" ")
        start_with = [sys.executable, "-m", "compress"]
        if argv[0] == "--ranks":
            argv = argv[1:]
            start_with = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d"]
            start_with += ["--rdzv-endpoint=localhost:0", "-m", "compress"]
        if argv[0] == "plan":
            (folder / "out").mkdir()
        done = subprocess.run([*start_with, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        printed.append(done.stdout)
        if done.returncode != 0:
            failed = {"failed": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
            break
    found = failed or digests(folder, printed)
    shutil.rmtree(folder)
    return name, found, time.monotonic() - start


def main() -> None:
    """Run the cases, store their digests and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--moe")
    parser.add_argument("--only", default="*", help="glob over names of cases")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    before = json.loads(given.against.read_text()) if given.against else {}
    moe = str(Path(given.moe).resolve()) if given.moe else None
    known = cases(str(Path(given.model).resolve()), moe)
    chosen = {name: text for name, text in known.items() if fnmatch.fnmatch(name, given.only)}
    found: dict[str, dict[str, str]] = {}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        waiting = [pool.submit(run, name, text) for name, text in chosen.items()]
        for future in concurrent.futures.as_completed(waiting):
            name, digest, seconds = future.result()
            found[name] = digest
            word = (
                "FAILED" if "failed" in digest else "" if name not in before else "same" if before[name] == digest else "DIFFERS"
            )
            print(f"{seconds:6.1f} s  {name:40s} {len(digest):2d} digests  {word}", flush=True)
            given.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    different = [name for name in found if before.get(name, found[name]) != found[name]]
    for name in different:
        old, new = before[name], found[name]
        print(
            f"{name}: " + "; ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k))
        )
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
