"""Rows of `bench/quality.py --out` as Markdown, best divergence of each width first.

python bench/table.py bench/results/quality-*.json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

HEAD = "| recipe | bits per weight | weight files | KL | ± | top-1 | perplexity | seconds of one core |"


def width(row: dict[str, Any]) -> float:
    """The bits that were asked for."""
    found = re.search(r"(?:plan-|-)([\d.]+)(?:bit)?$", row["recipe"])
    return float(found[1]) if found else row["bits_per_weight"]


def line(row: dict[str, Any]) -> str:
    """One row."""
    return (
        f"| {row['recipe']} | {row['bits_per_weight']:.3f} | {row['bytes'] / 1e6:.2f} MB | {row['kl']:.5f} "
        f"| {row['kl_standard_error']:.5f} | {row['agreement']:.1%} | {row['perplexity']:.3f} | {row['processor_seconds']:.0f} |"
    )


def main() -> None:
    """Print a table for each model and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    rows = [row for path in parser.parse_args().results for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    for model in sorted({row["model"] for row in rows}):
        before = next(row["perplexity_before"] for row in rows if row["model"] == model)
        for bits in sorted({width(row) for row in rows if row["model"] == model}):
            print(f"\n**{model}, about {bits:g} bits** (perplexity before {before:.3f})\n\n{HEAD}\n|{'---|' * 8}")
            mine = [row for row in rows if row["model"] == model and width(row) == bits]
            print("\n".join(line(row) for row in sorted(mine, key=lambda row: row["kl"])))


if __name__ == "__main__":
    main()
