"""The table of pruning: methods against sparsities and seeds, with size, KL divergence and perplexity on held-out text.

    python bench/prune.py --model MODEL --calibration IDS.npy --heldout IDS.npy [--case NAME ...] [--seeds 0 1 2]
        [--retrain perp|ast|bqpo] [--option rate=1e-3 ...] [--samples 128] [--windows 64] [--out results.json]

A seed draws the calibration windows; figures are means over seeds, with the standard deviation between them. `--list` prints the
cases: pruning alone at 60 % and 2:4, and at equal size pruning with quantization beside quantization alone. `--retrain` trains
every block afterwards by a method of `compress/retrain`, on the windows that it was pruned with. KL divergence is measured in
float32 over all positions but the first of each window, natural logarithm; bits per weight count all stored bits of the
compressed weights. Runs are made one after another in one process, whole: calibrated, written, read back.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compress import registry
from compress.architecture.config import vocabulary
from compress.calibration.data import load_ids
from compress.evaluation.quality import compare, open_any
from compress.recipe import reading as recipe_reading
from compress.recipe.data import Data
from compress.runs import estimate
from compress.runs import prepare as run_prepare
from compress.runs import run as run_module
from compress.runs.pipeline import Settings
from compress.system.files import write_json

Options = dict[str, Any]
BATCH_TOKENS = 2048  # what a step of training looks at
_TARGETS: dict[str, Options] = {"60%": {"sparsity": 0.6}, "2:4": {"pattern": "2:4"}}
_PRUNERS: dict[str, tuple[str, Options]] = {
    "magnitude": ("prune/magnitude", {}),
    "ria": ("prune/ria", {}),
    "wanda": ("prune/wanda", {}),
    "wanda matrix": ("prune/wanda", {"within": "matrix"}),
    "wanda+swaps+update": ("prune/wanda", {"swaps": 20, "update": True}),
    "sparsegpt": ("prune/sparsegpt", {}),
    "sparsegpt+update": ("prune/sparsegpt", {"update": True}),
    "alps": ("prune/alps", {}),
    "alps rows": ("prune/alps", {"within": "row"}),
}
CASES: dict[str, tuple[str, Options]] = {
    f"{name} {target}": (method, {**options, **more})
    for target, more in _TARGETS.items()
    for name, (method, options) in _PRUNERS.items()
    if not (target == "2:4" and options.get("within"))
}
CASES |= {
    "alps 50% 4-bit": ("prune/alps", {"sparsity": 0.5, "bits": 4, "group_size": 128}),
    "alps 2:4 4-bit": ("prune/alps", {"pattern": "2:4", "bits": 4, "group_size": 128}),
    "sparsegpt 2:4 4-bit": ("prune/sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": 128}),
    "alps 2:4 3-bit": ("prune/alps", {"pattern": "2:4", "bits": 3, "group_size": 128}),
    "gptq 2-bit g32": ("quant/gptq", {"bits": 2, "group_size": 32}),
    "gptq 2-bit g16": ("quant/gptq", {"bits": 2, "group_size": 16}),
    "slim 2.75-bit g128": ("quant/slim", {"bits": 2.75, "group_size": 128}),
    "gptq 3-bit g128": ("quant/gptq", {"bits": 3, "group_size": 128}),
    "gptq 8-bit g128": ("quant/gptq", {"bits": 8, "group_size": 128}),
    "gptq 4-bit g128": ("quant/gptq", {"bits": 4, "group_size": 128}),
}


def recipe_of(case: str, data: Options, training: Options | None) -> Options:
    """Return the values of a recipe for a case, with a stage of training if one is given."""
    method, options = CASES[case]
    values: Options = {
        "data": data,
        "batch_tokens": BATCH_TOKENS,
        "steps": [{"match": "*.*", "method": method, "options": options}],
    }
    return values if training is None else {**values, "tuning": [training]}


def measure(model: Path, case: str, data: Options, training: Options | None, heldout: torch.Tensor) -> dict[str, Any]:
    """Compress and measure; return the row."""
    values = recipe_of(case, data, training)
    started = time.perf_counter()
    plan = run_prepare.prepare(str(model), recipe_reading.parse(values))
    ids = run_prepare.calibration(plan)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        expected = estimate.estimate(plan, ids.shape[0], ids.shape[1], 4 << 30, False)
        summary = run_module.run(plan, ids, out, Settings(), lambda *_: None, expected)
        seconds = time.perf_counter() - started
        found = compare(open_any(str(out)), plan.source, heldout, torch.float32, plan.device, lambda *_: None)
    return {
        "case": case,
        "training": training,
        "seed": data["seed"],
        "bits_per_weight": summary.values["bits_per_compressed_weight"],
        "bytes": summary.values["bytes_after"],
        "sparsity": statistics.mean(row.notes.get("sparsity", 0.0) for row in summary.rows),
        "seconds": seconds,
        **found,
    }


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    threads = f"{torch.get_num_threads()} threads, {cpu}"
    return {"cpu": threads, "gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def show(case: str, rows: list[dict[str, Any]]) -> None:
    """Print the mean over seeds."""

    def mean(key: str) -> float:
        return statistics.mean(row[key] for row in rows)

    deviation = statistics.stdev([row["kl"] for row in rows]) if len(rows) > 1 else 0.0
    print(
        f"{case:>24} {mean('bits_per_weight'):7.3f} {mean('kl'):9.5f} {deviation:9.5f} {mean('agreement'):7.2%} "
        f"{mean('perplexity'):10.3f} {rows[0]['perplexity_before']:8.3f} {mean('seconds'):8.1f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--retrain", choices=registry.names("retrain"))
    parser.add_argument("--option", action="append", default=[], help="of the training, as rate=1e-3")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return
    if missing := [name for name in ("model", "calibration", "heldout") if getattr(arguments, name) is None]:
        parser.error(f"--{missing[0]} is needed")
    source = open_any(str(arguments.model))
    data = Data(name=str(arguments.heldout), samples=arguments.windows, seed=0)
    heldout = load_ids(data, source.folder, vocabulary(source), None)
    training = None
    if arguments.retrain:
        changes = [f"options.{option}" for option in arguments.option]
        training = recipe_reading.change({"method": f"retrain/{arguments.retrain}"}, changes)
    print(f"{'case':>24} {'bits':>7} {'KL':>9} {'± seeds':>9} {'top-1':>7} {'perplexity':>10} {'before':>8} {'seconds':>8}")
    rows = []
    for case in arguments.case or CASES:
        mine = []
        for seed in arguments.seeds:
            text = {"name": str(arguments.calibration), "samples": arguments.samples, "seed": seed}
            mine.append(measure(arguments.model, case, text, training, heldout))
        show(case, mine)
        rows += mine
        if arguments.out:
            shown = " ".join(Path(word).name if Path(word).exists() else word for word in sys.argv[1:])
            write_json(arguments.out, {"machine": machine(), "command": f"python bench/prune.py {shown}", "rows": rows})


if __name__ == "__main__":
    main()
