"""Output about checkpoints: their contents, whether they are intact, and cuts, exports and uploads of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.screen.console import console, table_of
from compress.system.files import human_bytes

if TYPE_CHECKING:
    from compress.inspection.contents import Contents
    from compress.inspection.diff import Difference
    from compress.inspection.doctor import Diagnosis
    from compress.interop.targets import Finding


def show_contents(c: Contents) -> None:
    """Print what a checkpoint holds."""
    out = console()
    state = "compressed" if c.compressed else "dense"
    table = table_of(f"{c.folder} ({c.model_type}, {state})", "kind", "count", "out x in", "blocks", "bits", "size", "stored")
    for kind in c.kinds:
        shapes = ", ".join(f"{a} x {b}" for a, b in kind.shapes)
        blocks = f"{kind.blocks[0]}-{kind.blocks[-1]}" if kind.blocks else "-"
        table.add_row(
            kind.name, str(kind.count), shapes, blocks, f"{kind.bits_per_weight:.3f}", human_bytes(kind.bytes), kind.stored
        )
    table.add_row("other tensors", str(c.other_tensors), "", "", "", human_bytes(c.other_bytes), "")
    out.print(table)
    sizes = [size for label, _, size in c.by_block if label != "head"]
    if sizes:
        least, most = human_bytes(min(sizes)), human_bytes(max(sizes))
        out.print(f"{c.blocks} blocks of {least}" + ("" if least == most else f" to {most}"))
    if c.notice is not None:
        out.print(f"note       {c.notice}", soft_wrap=True, markup=False)
    out.print(f"{c.weights:,} weights in {human_bytes(c.bytes)}: {c.bytes * 8 / c.weights:.3f} bits per weight")


def show_verified(found: dict[str, Any]) -> None:
    """Print that a checkpoint is what was written."""
    out = console()
    out.print(
        f"{found['folder']}: {found['files']} files match their checksums, {found['decoded']} of {found['sites']} weights "
        "are what was compressed,",
        soft_wrap=True,
    )
    if "tokens" not in found:
        return  # an export has no recorded batch
    difference = f"{found['mean_difference_nats']:.2g} nats (limit {found['limit_nats']})"
    out.print(f"{found['tokens']} tokens give the recorded losses to within {difference}")


def show_findings(target: str, found: Sequence[Finding]) -> None:
    """Print what a runtime may not support, to standard error."""
    for finding in found:
        print(f"warning: {target}: {finding.message}", file=sys.stderr)


def show_diagnosis(found: Diagnosis) -> None:
    """Print the diagnosis of a checkpoint."""
    out = console()
    out.print(f"{found.folder}: {found.kind}", soft_wrap=True, markup=False)
    for problem in found.problems:
        out.print(f"{problem.severity:8} {problem.stage:10} {problem.message}", soft_wrap=True, markup=False)
    for name, what in found.runtimes.items():
        out.print(f"runtime  {name:13} {what}", soft_wrap=True, markup=False)
    errors = sum(problem.severity == "error" for problem in found.problems)
    out.print("nothing is wrong" if found.healthy else f"{errors} error{'s' if errors > 1 else ''}")


def show_difference(found: Difference) -> None:
    """Print what differs between two checkpoints."""
    from compress.inspection.diff import grouped

    out = console()
    rows = grouped(found)
    table = table_of("", "name", "count", "verdict", "A", "B", "largest", "relative", "codes that differ")
    for row in rows:
        if row["verdict"] == "same":
            continue
        numbers = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("largest", "relative")]
        codes = "" if row["codes"] is None else f"{row['codes']:.2%}"
        table.add_row(row["name"], str(row["count"]), row["verdict"], row["first"], row["second"], *numbers, codes)
    out.print(f"A  {found.first}\nB  {found.second}", soft_wrap=True)
    if table.row_count:
        out.print(table)
    for key, (a, b) in found.config.items():
        out.print(f"config.json  {key}: {a!r} in A, {b!r} in B", soft_wrap=True, markup=False)
    same = sum(row["count"] for row in rows if row["verdict"] in ("same", "stored differently"))
    total = len(found.rows)
    out.print(f"{same} of {total} tensors have the same values" + ("" if same < total else ": the checkpoints are the same"))


def show_cut(folder: str, made: dict[str, Any]) -> None:
    """Print what was cut."""
    out = console()
    table = table_of(folder + (" (was there already)" if made.get("resumed") else ""), "", "before", "after")
    table.add_row("size", human_bytes(made["bytes_before"]), human_bytes(made["bytes_after"]))
    table.add_row("weights", f"{made['weights']:,}", f"{made['weights_after']:,}")
    for key, value in made["before"].items():
        if value:
            table.add_row(key.replace("_", " "), str(value), str(made["after"][key]))
    out.print(table)
    if gone := [block for block in range(made["before"]["blocks"]) if block not in made["blocks"]]:
        out.print(f"blocks that are gone: {', '.join(map(str, gone))}")
    if found := made.get("by_magnitude"):
        out.print(
            f"cut by magnitude, since no token of the text reached them: {len(found)} weights, such as {found[0]}", soft_wrap=True
        )
    out.print(f"{made['seconds']:.1f} s, {human_bytes(made['peak_memory'])} peak memory")
    first = "import compress; " if made.get("sizes") else ""
    if made.get("sizes"):
        out.print("sizes of heads and channels are means: blocks differ")
    out.print(f'load with  {first}AutoModelForCausalLM.from_pretrained("{folder}")', soft_wrap=True, markup=False)


def show_exports(made: Sequence[dict[str, Any]]) -> None:
    """Print what was exported."""
    from compress.interop.exporter import lookup

    out = console()
    for found in made:
        state = " (was there already)" if found.get("resumed") else ""
        table = table_of(f"{found['output']}: {found['format']}{state}", "", "before", "after")
        table.add_row("size", human_bytes(found["bytes_before"]), human_bytes(found["bytes"]))
        weights = found["bytes"] * 8 / found["bits_per_weight"]
        table.add_row("bits per weight", f"{found['bytes_before'] * 8 / weights:.3f}", f"{found['bits_per_weight']:.3f}")
        out.print(table)
        for how, count in found["stored"].items():
            out.print(f"{count} weights: {how}")
        for how, count in found["widened"].items():
            out.print(f"{count} weights with wider codes: {how}")
        what = "values" if lookup(found["format"]).plain else "scales"
        out.print(f"{what} in {', '.join(found['scale_dtypes'])}; all values read back as they were")


def show_push(found: dict[str, Any]) -> None:
    """Print what was, or would be, published."""
    out = console()
    where = f"{found['repository']} ({'private' if found['private'] else 'public'})"
    table = table_of(where if found["url"] else f"would go to {where}", "file", "size")
    for name, size in found["files"].items():
        table.add_row(name, human_bytes(size))
    out.print(table)
    out.print(f"{len(found['files'])} files, {human_bytes(found['bytes'])}")
    out.print(f"published  {found['url']}" if found["url"] else "nothing was sent", soft_wrap=True)
