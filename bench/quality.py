"""The table of quality: recipes against models, with size, KL divergence, perplexity and seconds.

    python bench/quality.py --model MODEL [--model ...] --calibration IDS.npy --heldout IDS.npy
        [--recipe NAME_OR_FILE ...] [--bits 4 3 2] [--out results.json]

Without --recipe: GPTQ and round-to-nearest, symmetric, group 128, at each of --bits. Every run is a process of its own, so the
seconds are what a user waits for. KL divergence is measured in float32 over all positions but the first of each window, natural
logarithm; bits per weight count all stored bits of the compressed weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.files import write_json

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
)


def step(method: str, bits: int) -> dict[str, Any]:
    """The recipe that the comparison with other tools uses: symmetric, group 128, all linears in blocks."""
    return {"steps": [{"match": "*.*", "method": method, "options": {"bits": bits, "group_size": 128, "symmetric": True}}]}


def measure(model: Path, recipe: str, calibration: Path, heldout: Path, device: str) -> dict[str, Any]:
    """Compress in one process, evaluate in another; return the row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        run = ["run", recipe, str(model), "-o", str(out), "--data", str(calibration), "--json", "--device", device]
        started = time.perf_counter()
        made = call(*run)
        seconds = time.perf_counter() - started
        options = ["--original", str(model), "--data", str(heldout), "--no-speed", "--json", "--device", device]
        found = call("eval", str(out), *options)
        shutil.rmtree(out)
    return {
        "model": model.name,
        "recipe": Path(recipe).stem,
        "bits_per_weight": made["bits_per_compressed_weight"],
        "bytes": made["bytes_after"],
        "kl": found["kl"],
        "kl_standard_error": found["kl_standard_error"],
        "agreement": found["agreement"],
        "perplexity": found["perplexity"],
        "perplexity_before": found["perplexity_before"],
        "seconds": seconds,
    }


def call(*arguments: str) -> dict[str, Any]:
    """Run a command of compress and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-m", "compress", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"compress {' '.join(arguments)}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    cpu = f"{torch.get_num_threads()} threads, {model or platform.processor()}"
    return {"cpu": cpu, "gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        recipes = list(arguments.recipe)
        if not recipes:
            for method in ("quant/gptq", "quant/rtn"):
                for bits in arguments.bits:
                    path = Path(folder) / f"{method.split('/')[1]}-{bits}bit-g128.yaml"
                    path.write_text(yaml.safe_dump(step(method, bits)))
                    recipes.append(str(path))
        print(" ".join(name.rjust(width) for name, width in HEADS))
        for model in arguments.model:
            for recipe in recipes:
                row = measure(model, recipe, arguments.calibration, arguments.heldout, arguments.device)
                rows.append(row)
                print(
                    f"{row['model']:>14} {row['recipe']:>22} {row['bits_per_weight']:>7.3f} {row['kl']:>9.5f} "
                    f"{row['kl_standard_error']:>8.5f} {row['agreement']:>7.2%} {row['perplexity']:>10.3f} "
                    f"{row['perplexity_before']:>8.3f} {row['seconds']:>8.1f}",
                    flush=True,
                )
    if arguments.out:
        shown = " ".join(Path(word).name if Path(word).exists() else word for word in sys.argv[1:])
        write_json(arguments.out, {"machine": machine(), "command": f"python bench/quality.py {shown}", "rows": rows})


if __name__ == "__main__":
    main()
