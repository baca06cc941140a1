"""What a dry run predicts against what a run takes: peak memory, time and bytes, on the demo and on a random checkpoint of 1 GB.

    python bench/predict.py [--methods rtn gptq] [--hidden 2048] [--blocks 11] [--folder FOLDER]

Writes a random Llama (bfloat16, MLP 2.75 times the width), compresses it and examples/demo with each method in a process of its
own, and prints predicted and measured figures; ends with an error where memory is off by more than 15 % or bytes by one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from memory import VOCABULARY, write_checkpoint

from compress.system.files import duration, human_bytes

DEMO = Path(__file__).parent.parent / "examples" / "demo"


def measure(model: Path, data: Path, out: Path, method: str, more: list[str]) -> dict[str, float]:
    """Compress in a process of its own; return what was predicted and measured."""
    command = [
        sys.executable,
        "-m",
        "compress",
        "quantize",
        model,
        "-o",
        out,
        "--method",
        method,
        "--data",
        data,
        "--json",
        *more,
    ]
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    said = found["predicted"]
    written = sum(path.stat().st_size for path in out.glob("model*.safetensors*"))
    shutil.rmtree(out)
    return {
        "memory": found["peak_memory"],
        "said_memory": said["memory"],
        "seconds": found["seconds"],
        "said_seconds": said["seconds"],
        "bytes": written,
        "said_bytes": said["files_after"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        ids = folder / "ids.npy"
        np.save(ids, np.random.default_rng(0).integers(0, VOCABULARY, (16, 256), dtype=np.int32))
        random = write_checkpoint(folder / "random", arguments.blocks, arguments.hidden)
        cases = [("demo", DEMO, DEMO / "calibration.jsonl", ["--samples", "128", "--length", "256"]), ("random", random, ids, [])]
        print(
            f"{'model':>8} {'method':>6} {'memory':>10} {'said':>10} {'':>6} {'time':>9} {'said':>9} {'bytes':>14} {'said':>14}"
        )
        for label, model, data, more in cases:
            for method in arguments.methods:
                r = measure(model, data, folder / "out", method, more)
                off = r["said_memory"] / r["memory"] - 1
                print(
                    f"{label:>8} {method:>6} {human_bytes(r['memory']):>10} {human_bytes(r['said_memory']):>10} {off:>+6.1%} "
                    f"{duration(r['seconds']):>9} {duration(r['said_seconds']):>9} {r['bytes']:>14,} {r['said_bytes']:>14,}",
                    flush=True,
                )
                good = good and abs(off) <= 0.15 and r["bytes"] == r["said_bytes"]
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
