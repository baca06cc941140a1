"""What people see in the terminal: progress, plans, tables. The only file beside the command line that knows rich."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from compress import memory
from compress.files import duration, human_bytes

if TYPE_CHECKING:
    from compress.diagnosis import Diagnosis
    from compress.difference import Difference
    from compress.estimate import Estimate
    from compress.evaluate.bench import Bench
    from compress.evaluate.quality import Quality
    from compress.inspection import Contents
    from compress.prepare import Plan
    from compress.run import Summary
    from compress.targets import Finding

Listen = Callable[[int, int, str, float], None]
_PIPED = 160  # columns where there is no terminal
_NUMBERS = (
    *("count", "largest", "relative", "codes that differ", "bits", "size", "before", "after", "original", "model"),
    *("predicted KL", "measured KL", "weights"),
)
# Where a step of a block begins and how much of the block's time it is likely to take.
_STEPS = {
    "loading": (0.0, 0.02),
    "calibrating": (0.02, 0.45),
    "compressing": (0.47, 0.28),
    "running": (0.75, 0.25),
    "replaying": (0.0, 1.0),
    "gradients": (0.0, 1.0),
}


def _out() -> Console:
    console = Console(highlight=False)
    # What reads a pipe wants a row of a table on a line.
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_PIPED)


def _table(title: str, *columns: str) -> Table:
    """A table without boxes: only the last column may wrap, numbers stand on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=name not in ("method", "stored"), justify="right" if name in _NUMBERS else "left")
    return table


class _TimeLeft(ProgressColumn):
    """Time left at the rate of the blocks that are done."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["begun"]
        if done < 0.02 * task.fields["blocks"] or not task.elapsed:
            return Text("-:-- left")
        seconds = int(task.elapsed / done * ((task.total or 0) - task.completed))
        return Text(
            f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
            if seconds >= 3600
            else f"{seconds // 60}:{seconds % 60:02d} left"
        )


@contextmanager
def progress(quiet: bool) -> Iterator[Listen]:
    """Yield what a run reports to: a live line on a terminal, a line per block elsewhere, nothing when quiet."""
    if quiet:
        yield lambda block, blocks, step, share: None
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _plain_lines()
        return
    columns = [
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        _TimeLeft(),
    ]
    with Progress(*columns, TextColumn("{task.fields[memory]}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, begun=0.0, blocks=1, memory="")
        first: list[float] = []

        def listen(block: int, blocks: int, step: str, share: float) -> None:
            start, size = _STEPS.get(step, (0.0, 1.0))
            done = block + start + size * share
            first.append(done) if not first else None
            name = f"block {min(block + 1, blocks)}/{blocks}  {step}" if step in _STEPS else step
            peak = f"{human_bytes(memory.peak())} peak"
            bar.update(task, description=name, total=float(blocks), completed=done, begun=first[0], blocks=blocks, memory=peak)

        yield listen


def _plain_lines() -> Listen:
    said: set[tuple[int, str]] = set()
    start = time.monotonic()

    def listen(block: int, blocks: int, step: str, share: float) -> None:
        key = (block, step if step not in ("calibrating", "compressing", "running") else "block")
        if key in said or step == "loading":
            return
        said.add(key)
        what = (
            f"block {block + 1}/{blocks}"
            if key[1] == "block"
            else step
            if block >= blocks
            else f"block {block + 1}/{blocks} {step}"
        )
        print(f"{time.monotonic() - start:8.1f} s  {what}  ({human_bytes(memory.peak())} peak)", file=sys.stderr, flush=True)

    return listen


def describe_plan(plan: Plan, expected: Estimate, ids: tuple[int, int]) -> dict[str, Any]:
    """What a dry run says, as JSON values."""
    from compress import estimate

    devices = [] if expected.on_host else [estimate.free_on(plan.device)]
    kinds: dict[tuple[str, str, str], list[Any]] = {}
    for a in plan.assignments:
        shape = f"{a.site.shape[0]} x {a.site.shape[1]}"
        options = ", ".join(f"{key}={value}" for key, value in _shown(a.method.model_dump()).items())
        kinds.setdefault((a.site.kind, shape, f"{a.method.path} {options}"), []).append(a)
    rows = []
    for (kind, shape, method), members in kinds.items():
        bits = members[0].method.stored_bits(members[0].site.shape)
        rows.append(
            {
                "kind": kind,
                "count": len(members),
                "shape": shape,
                "method": method,
                "bits_per_weight": bits and bits / members[0].site.numel,
            }
        )
    untouched = len(plan.claims.sites) - len(plan.assignments)
    return {
        "model": plan.source.name,
        "model_type": plan.source.model_type,
        "device": plan.device.type,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "calibration": {"samples": ids[0], "length": ids[1]} if plan.calibrated else None,
        "transforms": [stage.method.path for stage in plan.transforms],
        "afterwards": [stage.method.path for stage in plan.tuning]
        + [f"{stage.method.path} of the whole model" for stage in plan.retraining],
        "sites": rows,
        "untouched_linears": untouched,
        "copied_tensors": len(plan.claims.copied),
        "dropped_tensors": plan.claims.dropped,
        "bytes_before": expected.bytes_before,
        "bytes_after": expected.bytes_after,
        "bytes_after_exact": expected.exact,
        "files_after": expected.files_after,
        "memory": expected.memory,
        "device_memory": expected.device_memory,
        "reload_memory": expected.reload_memory,
        "statistics": expected.statistics,
        "disk": expected.disk,
        "seconds": expected.seconds,
        "warnings": estimate.shortfall(expected, devices),
    }


_OPTIONS = ("sparsity", "pattern", "group", "within", "datatype", "bits", "group_size", "symmetric", "order", "range")
_OF_CODES = ("group_size", "symmetric")  # that mean nothing where values stay as they are


def _shown(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method that a table has room for."""
    dense = "bits" in options and options["bits"] is None
    if "sparsity" in options and options["sparsity"] is None and options["pattern"] is None:
        options = {**options, "sparsity": 0.5}
    hidden = {*(_OF_CODES if dense else ()), *(("group",) if options.get("group") == 1 else ())}
    hidden |= {"within"} if options.get("pattern") else set()
    return {key: options[key] for key in _OPTIONS if options.get(key) is not None and key not in hidden}


def show_plan(found: dict[str, Any]) -> None:
    """Print a plan as a table."""
    out = _out()
    table = _table(f"{found['model']} ({found['model_type']})", "kind", "count", "out x in", "bits", "method")
    for row in found["sites"]:
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        table.add_row(row["kind"], str(row["count"]), row["shape"], bits, row["method"])
    out.print(table)
    if found["afterwards"]:
        out.print(f"afterwards {', '.join(found['afterwards'])}")
    if found["transforms"]:
        out.print(f"before     {', '.join(found['transforms'])}")
    about = "" if found["bytes_after_exact"] else "about "
    out.print(f"size       {human_bytes(found['bytes_before'])} -> {about}{human_bytes(found['bytes_after'])}")
    out.print(f"files      {about}{found['files_after']:,} bytes of weight files")
    copied, dropped = found["copied_tensors"], len(found["dropped_tensors"])
    out.print(f"untouched  {found['untouched_linears']} linears, {copied} other tensors copied, {dropped} dropped")
    if found["calibration"]:
        out.print(f"data       {found['calibration']['samples']} windows of {found['calibration']['length']} tokens")
    out.print(
        f"memory     about {human_bytes(found['memory'])}, of which statistics {human_bytes(found['statistics'])} if all at once"
    )
    if found["device_memory"] is not None:
        out.print(f"on the GPU about {human_bytes(found['device_memory'])}")
    out.print(f"disk       about {human_bytes(found['disk'])} while it runs")
    if found["seconds"] is not None:
        out.print(f"time       about {duration(found['seconds'])} on this machine, to within a factor of two")
    out.print(f"runs on    {found['device']} in {found['dtype']}")
    if found.get("target"):
        out.print(f"target     {found['target']} will load it" + (", see the warnings" if found["warnings"] else ""))
    for warning in found["warnings"]:
        out.print(f"warning    {warning}", soft_wrap=True)


def show_outlook(found: dict[str, Any]) -> None:
    """Print which budgets are possible."""
    out = _out()
    table = _table(f"{found['model']}: every weight by one candidate", "bits", "size", "weights", "memory", "all weights by")
    for row in found["candidates"]:
        about = "" if row["exact"] else "about "
        size, memory_ = about + human_bytes(row["bytes"]), human_bytes(row["memory"])
        table.add_row(f"{row['bits_per_weight']:.4f}", size, f"{row['weights']:,}", memory_, row["candidate"])
    out.print(table)
    smallest, largest = human_bytes(found["smallest"]), human_bytes(found["largest"])
    out.print(f"possible   {smallest} to {largest}, from {human_bytes(found['bytes_before'])}; nothing was read but headers")
    if found["possible"] is False:
        out.print("warning    the budget is below what any candidate takes; ask for more, or give smaller --candidates")


def show_planned(found: dict[str, Any]) -> None:
    """Print a plan of bits, what it was chosen from, and how far its predictions can be trusted."""
    out = _out()
    measured = {r["candidate"]: (r["measured"], r["standard_error"]) for r in found["references"]}
    rows: list[tuple[float, int, float, str, tuple[float, float | None] | None]] = []
    rows += [(p["bits_per_weight"], p["bytes"], p["kl"], "milp", None) for p in found["front"]]
    rows += [(u["bits_per_weight"], u["bytes"], u["kl"], u["candidate"], measured.get(u["candidate"])) for u in found["uniform"]]
    table = _table("divergence against size", "bits", "size", "predicted KL", "measured KL", "all weights by")
    for bits, size, kl, what, seen in sorted(rows, key=lambda row: (row[0], row[3])):
        table.add_row(f"{bits:.4f}", human_bytes(size), f"{kl:.5f}", _measured(seen), what)
    out.print(table)
    counts: dict[str, int] = {}
    for label in found["choices"].values():
        counts[label] = counts.get(label, 0) + 1
    table = _table("the plan", "weights", "method")
    for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(str(count), label)
    out.print(table)
    whole = human_bytes(found["bytes"]) + (
        "" if found["sizes_exact"] else " or about that: a method's size depends on the values"
    )
    out.print(f"plan         {found['bits_per_weight']:.4f} bits per weight, checkpoint {whole}, by {found['planner']}")
    check = "" if found["measured_kl"] is None else _measured((found["measured_kl"], found["measured_kl_standard_error"]))
    out.print(f"KL           {found['kl']:.5f} predicted{', ' + check + ' measured' if check else ''}")
    if found["planner"] == "milp":
        out.print(f"optimality   {'proven' if found['exact'] else 'best found'}, gap {found['gap']:.1e} of what is minimised")
    limit = found["budget"]["max_kl"]
    if limit is not None and found["measured_kl"] is not None and found["measured_kl"] > limit:
        out.print(f"above        the KL of {limit:g} that was asked for: predictions did not come closer; ask for less")
    state = "reused from" if found["reused"] else "kept in"
    out.print(f"sensitivity  {state} {found['sensitivities']}", soft_wrap=True)
    if found.get("recipe"):
        out.print(f"recipe       {found['recipe']}", soft_wrap=True)
        out.print(f"plot         {found['plot'] or 'none: matplotlib is not installed'}", soft_wrap=True)


def show_curve(found: dict[str, Any]) -> None:
    """Print a sweep."""
    out = _out()
    title = f"{found['model']} by {found['method']}: {found['windows']} windows of {found['length']} tokens"
    table = _table(title, found["option"], "removed", "bits", "KL", "perplexity", "of the original's")
    for p in found["points"]:
        table.add_row(
            f"{p['setting']:g}" if isinstance(p["setting"], float | int) else p["setting"],
            f"{p['sparsity']:.2%}",
            f"{p['bits_per_weight']:.3f}",
            _measured((p["kl"], p["kl_standard_error"])),
            f"{p['perplexity']:.3f}",
            f"{p['perplexity'] / found['perplexity']:.3f}",
        )
    out.print(table)
    out.print(f"original   perplexity {found['perplexity']:.3f}")
    within = found["within_1_percent"]
    out.print(f"within 1 % {'none of these' if within is None else within}")
    if found["knee"] is not None:
        out.print(f"knee       {found['knee']:.3g}")
    if found["plot"]:
        out.print(f"plot       {found['plot']}", soft_wrap=True)


def _measured(seen: tuple[float, float | None] | None) -> str:
    if seen is None:
        return ""
    return f"{seen[0]:.5f}" + ("" if seen[1] is None else f" ± {seen[1]:.5f}")


def plain_summary(summary: Summary, quality: Quality | None) -> dict[str, Any]:
    """What a run gave, as JSON values."""
    from compress import same_size

    values = {k: v for k, v in summary.values.items() if k not in ("identity", "check")}
    evaluation = quality.plain() if quality else None
    pruned = same_size.compare(summary.rows)
    return {
        "output": str(summary.out),
        **values,
        "peak_memory": memory.peak(),
        "pruned": pruned and pruned.plain(),
        "evaluation": evaluation,
    }


def show_summary(summary: Summary, quality: Quality | None) -> None:
    """Print what a run gave."""
    from compress import same_size

    v, out = summary.values, _out()
    if summary.resumed:
        out.print(f"{summary.out} is there already, made by the same job", soft_wrap=True)
    table = _table(str(summary.out), "", "before", "after")
    table.add_row("size", human_bytes(v["bytes_before"]), human_bytes(v["bytes_after"]))
    table.add_row("bits per weight, whole file", f"{v['bytes_before'] * 8 / v['weights']:.3f}", f"{v['bits_per_weight']:.3f}")
    table.add_row(f"bits per weight, {v['sites']} compressed", "", f"{v['bits_per_compressed_weight']:.3f}")
    if quality is not None:
        _quality_rows(table, quality)
    out.print(table)
    if (pruned := same_size.compare(summary.rows)) is not None:
        for place, sentence in zip(("pruned", ""), pruned.sentences, strict=False):
            out.print(f"{place:10} {sentence}", soft_wrap=True)
    fallbacks = f", {v['fallbacks']} weights by a fallback (see the report)" if v["fallbacks"] else ""
    out.print(f"{v['seconds']:.1f} s, {human_bytes(memory.peak())} peak memory{fallbacks}")
    if (said := v.get("predicted")) and said["seconds"] is not None:
        files = sum(path.stat().st_size for path in summary.out.glob("model*.safetensors*"))
        right = (
            f"{files:,} bytes of weight files, as predicted"
            if files == said["files_after"]
            else (f"{said['files_after']:,} bytes of weight files predicted, {files:,} written")
        )
        out.print(f"predicted  {duration(said['seconds'])}, {human_bytes(said['memory'])} peak memory; {right}")
    if v.get("cache"):
        out.print(
            f"cache      {v['cache']['found']} passes of the calibration over a block skipped, {v['cache']['made']} made and kept"
        )
    out.print(f"checked    {_checked(v)}", soft_wrap=True)
    out.print(f"report     {summary.out / 'report.html'}", soft_wrap=True)
    out.print(f'load with  import compress; AutoModelForCausalLM.from_pretrained("{summary.out}")', soft_wrap=True)


def _checked(values: dict[str, Any]) -> str:
    """What was done to find out whether the files are good, in a line."""
    if "read_back" not in values:
        return "not: an older compress wrote this; compress verify checks what was recorded"
    seen, again = values["read_back"], values["reload"]
    unknown = f" ({len(seen['unknown_formats'])} formats unknown to it)" if seen["unknown_formats"] else ""
    decoded = f"{seen['decoded']} weights by a second reader{unknown}, {seen['copied']} copied tensors"
    if "skipped" in again:
        return f"{decoded}; not loaded anew: {again['skipped']}"
    return f"{decoded}; transformers {again['transformers']} loads it anew ({again['seconds']:.1f} s)"


def _quality_rows(table: Table, q: Quality) -> None:
    table.add_row(
        "perplexity",
        "" if q.perplexity_before is None else f"{q.perplexity_before:.3f}",
        f"{q.perplexity:.3f}{_between(q.perplexity_interval, '.3f')}",
    )
    if q.perplexity_ratio is not None:
        ratio = f"{q.perplexity_ratio:.4f}{_between(q.perplexity_ratio_interval, '.4f')}"
        table.add_row("perplexity over the original's", "", ratio)
    if q.kl is not None:
        table.add_row("KL divergence (nats)", "", f"{q.kl:.5f}{_between(q.kl_interval, '.5f')}")
        table.add_row("top-1 agreement", "", f"{q.agreement:.2%}{_between(q.agreement_interval, '.2%')}")
    for name, score in (q.tasks or {}).items():
        before = "" if score["before"] is None else f"{score['before']:.3f}"
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
        table.add_row(f"{name} ({score['metric']})", before, f"{score['model']:.3f}{error}")
    if q.tokens_per_second is not None:
        before = "" if q.tokens_per_second_before is None else f"{q.tokens_per_second_before:.1f}"
        table.add_row("tokens per second, batch 1", before, f"{q.tokens_per_second:.1f}")


def _between(interval: tuple[float, float] | None, form: str) -> str:
    """A 95 % interval, as it stands behind a value."""
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def show_quality(q: Quality) -> None:
    """Print a measurement."""
    out = _out()
    table = _table(f"{q.model} on {q.data}: {q.windows} windows of {q.length} tokens", "", "original", "model")
    table.add_row("size", "" if q.bytes_before is None else human_bytes(q.bytes_before), human_bytes(q.bytes))
    _quality_rows(table, q)
    out.print(table)
    if q.perplexity_interval is not None:
        out.print(f"in brackets: 95 % intervals by the bootstrap over {q.windows} windows", markup=False)
    if q.original is None:
        out.print("no original: give --original MODEL for KL divergence and agreement")


def show_bench(b: Bench) -> None:
    """Print how fast products are."""
    out = _out()
    machine = f"copies {b.bytes_per_second / 1e9:,.4g} GB/s, products {b.operations_per_second / 1e12:.3g} TFLOP/s"
    table = _table(
        f"{b.device}, {b.dtype}: {machine}",
        "out x in",
        "stored",
        "tokens",
        "by",
        "us",
        "floor",
        "share",
        "dense",
        "gain",
        "error",
    )
    for r in b.rows:
        times = (
            f"{r.microseconds:.4g}",
            f"{r.floor:.3g}",
            f"{r.share:.0%}",
            f"{r.dense:.4g}",
            f"{r.gain:.2f}",
            f"{r.difference:.1e}",
        )
        table.add_row(f"{r.out} x {r.columns}", r.stored, str(r.tokens), f"{r.path} ({r.how})", *times)
    out.print(table)
    out.print("us: median of one product; floor: what bytes and arithmetic take at these rates; gain: dense over us")
    out.print("\n".join(b.plain()["bit_serial"]), end="\n" if b.plain()["bit_serial"] else "")
    if b.tokens_per_second is not None:
        before = "" if b.tokens_per_second_before is None else f", its original {b.tokens_per_second_before:.4g}"
        out.print(f"generation: {b.tokens_per_second:.4g} tokens per second{before}")
    if b.device.startswith("CPU"):
        out.print("measured on a CPU: kernels for a GPU did not run")


def show_contents(c: Contents) -> None:
    """Print what a checkpoint holds."""
    out = _out()
    state = "compressed" if c.compressed else "dense"
    table = _table(f"{c.folder} ({c.model_type}, {state})", "kind", "count", "out x in", "blocks", "bits", "size", "stored")
    for kind in c.kinds:
        shapes = ", ".join(f"{a} x {b}" for a, b in kind.shapes)
        blocks = f"{kind.blocks[0]}-{kind.blocks[-1]}" if kind.blocks else "-"
        table.add_row(
            kind.name, str(kind.count), shapes, blocks, f"{kind.bits_per_weight:.3f}", human_bytes(kind.bytes), kind.stored
        )
    table.add_row("other tensors", str(c.other_tensors), "", "", "", human_bytes(c.other_bytes), "")
    out.print(table)
    sizes = [size for label, _, size in c.by_block if label != "head"]
    out.print(f"{c.blocks} blocks of {human_bytes(min(sizes))} to {human_bytes(max(sizes))}")
    out.print(f"{c.weights:,} weights in {human_bytes(c.bytes)}: {c.bytes * 8 / c.weights:.3f} bits per weight")


def show_verified(found: dict[str, Any]) -> None:
    """Print that a checkpoint is what was written."""
    out = _out()
    out.print(
        f"{found['folder']}: {found['files']} files match their checksums, {found['decoded']} of {found['sites']} weights "
        "are what was compressed,",
        soft_wrap=True,
    )
    difference = f"{found['mean_difference_nats']:.2g} nats (limit {found['limit_nats']})"
    out.print(f"{found['tokens']} tokens give the recorded losses to within {difference}")


def show_findings(target: str, found: Sequence[Finding]) -> None:
    """Print what a runtime may not like, beside the output."""
    for finding in found:
        print(f"warning: {target}: {finding.message}", file=sys.stderr)


def show_cut(folder: str, made: dict[str, Any]) -> None:
    """Print what was cut."""
    out = _out()
    table = _table(folder + (" (was there already)" if made.get("resumed") else ""), "", "before", "after")
    table.add_row("size", human_bytes(made["bytes_before"]), human_bytes(made["bytes_after"]))
    table.add_row("weights", f"{made['weights']:,}", f"{made['weights_after']:,}")
    for key, value in made["before"].items():
        if value:
            table.add_row(key.replace("_", " "), str(value), str(made["after"][key]))
    out.print(table)
    if gone := [block for block in range(made["before"]["blocks"]) if block not in made["blocks"]]:
        out.print(f"blocks that are gone: {', '.join(map(str, gone))}")
    out.print(f"{made['seconds']:.1f} s, {human_bytes(made['peak_memory'])} peak memory")
    out.print(f'load with  AutoModelForCausalLM.from_pretrained("{folder}")', soft_wrap=True, markup=False)


def show_exports(made: list[dict[str, Any]]) -> None:
    """Print what was exported."""
    out = _out()
    for found in made:
        state = " (was there already)" if found.get("resumed") else ""
        table = _table(f"{found['output']}: {found['format']}{state}", "", "before", "after")
        table.add_row("size", human_bytes(found["bytes_before"]), human_bytes(found["bytes"]))
        weights = found["bytes"] * 8 / found["bits_per_weight"]
        table.add_row("bits per weight", f"{found['bytes_before'] * 8 / weights:.3f}", f"{found['bits_per_weight']:.3f}")
        out.print(table)
        for how, count in found["stored"].items():
            out.print(f"{count} weights: {how}")
        for how, count in found["widened"].items():
            out.print(f"{count} weights with wider codes: {how}")
        out.print(f"scales in {', '.join(found['scale_dtypes'])}; all values read back as they were")


def show_push(found: dict[str, Any]) -> None:
    """Print what was, or would be, published."""
    out = _out()
    where = f"{found['repository']} ({'private' if found['private'] else 'public'})"
    table = _table(where if found["url"] else f"would go to {where}", "file", "size")
    for name, size in found["files"].items():
        table.add_row(name, human_bytes(size))
    out.print(table)
    out.print(f"{len(found['files'])} files, {human_bytes(found['bytes'])}")
    out.print(f"published  {found['url']}" if found["url"] else "nothing was sent", soft_wrap=True)


def show_comparison(found: dict[str, Any]) -> None:
    """Print checkpoints by size, with a star at those that no other beats."""
    out = _out()
    table = _table("divergence against size", "checkpoint", "size", "bits", "measured KL", "agreement", "stored")
    for entry in found["checkpoints"]:
        kl = "" if entry["kl"] is None else f"{entry['kl']:.5f}{_between(entry['kl_interval'], '.5f')}"
        agreement = "" if entry["agreement"] is None else f"{entry['agreement']:.2%}"
        name, bits = entry["name"] + (" *" if entry["best"] else ""), f"{entry['bits_per_compressed_weight']:.3f}"
        table.add_row(name, human_bytes(entry["bytes"]), bits, escape(kl), agreement, ", ".join(entry["methods"]))
    out.print(table)
    out.print("* no other is both smaller and nearer to the original")
    for notice in found["notices"]:
        out.print(notice, markup=False)
    if found["page"]:
        out.print(f"page       {found['page']}", soft_wrap=True)


def show_bisection(found: dict[str, Any]) -> None:
    """Print what was tried, and what hurts most."""
    out = _out()
    table = _table("divergence with some of the weights dense", "made dense", "weights", "measured KL")
    for trial in found["trials"]:
        table.add_row(trial["what"], str(trial["sites"]), f"{trial['kl']:.5f}")
    out.print(table)
    for what, kl in ((found["block"], found["block_kl"]), (found["site"], found["site_kl"])):
        share = 1 - kl / found["kl"] if found["kl"] > 0 else 0.0
        out.print(
            f"hurts most: {what}, without which {kl:.5f} nats of {found['kl']:.5f} are left ({share:.0%} less)", soft_wrap=True
        )


def show_rehearsal(found: dict[str, Any]) -> None:
    """Print what was tried, and what would fail."""
    out = _out()
    table = _table(f"rehearsal of {found['model']}", "stage", "seconds", "")
    for stage in found["stages"]:
        table.add_row(stage["name"], f"{stage['seconds']:.1f}", "fails" if stage["problem"] else "good")
    out.print(table)
    if found["changed"]:
        changed = ", ".join(f"{key} {new} for {old}" for key, (old, new) in found["changed"].items())
        out.print(f"the copy has {changed}; random weights", soft_wrap=True)
    if "transformers" in found["reload"]:
        out.print(f"transformers {found['reload']['transformers']} loads the result")
    for stage in found["stages"]:
        if stage["problem"]:
            out.print(f"would fail: {stage['problem']}", soft_wrap=True, markup=False)


def show_difference(found: Difference) -> None:
    """Print what differs between two checkpoints."""
    from compress.difference import grouped

    out = _out()
    rows = grouped(found)
    table = _table("", "name", "count", "verdict", "A", "B", "largest", "relative", "codes that differ")
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


def show_diagnosis(found: Diagnosis) -> None:
    """Print what was found in a checkpoint."""
    out = _out()
    out.print(f"{found.folder}: {found.kind}", soft_wrap=True, markup=False)
    for problem in found.problems:
        out.print(f"{problem.severity:8} {problem.stage:10} {problem.message}", soft_wrap=True, markup=False)
    for name, what in found.runtimes.items():
        out.print(f"runtime  {name:13} {what}", soft_wrap=True, markup=False)
    errors = sum(problem.severity == "error" for problem in found.problems)
    out.print("nothing is wrong" if found.healthy else f"{errors} error{'s' if errors > 1 else ''}")


def describe_methods() -> dict[str, Any]:
    """All methods with their options, as JSON values."""
    from compress import registry

    found = {}
    for path in registry.methods():
        method = registry.method(path)
        module = sys.modules[method.__module__].__doc__ or ""
        schema = method.model_json_schema()["properties"]
        options = {
            k: {"default": v.get("default"), "choices": v.get("enum"), "about": v.get("description", "")}
            for k, v in schema.items()
        }
        found[path] = {
            "about": module.strip().splitlines()[0],
            "needs": [kind.__name__ for kind in method.needs],
            "needs_by_default": [kind.__name__ for kind in method().needs],
            "options": options,
        }
    return found


def show_methods(found: dict[str, Any]) -> None:
    """Print the methods."""
    out = _out()
    for path, method in found.items():
        needs = f" (needs calibration: {', '.join(method['needs'])})" if method["needs"] else " (needs no data)"
        if method["needs"] and not method["needs_by_default"]:
            needs = f" (needs no data; some options need calibration: {', '.join(method['needs'])})"
        out.print(f"[bold]{path}[/bold]{needs}\n  {method['about']}")
        for name, option in method["options"].items():
            choices = f", one of {', '.join(map(str, option['choices']))}" if option["choices"] else ""
            out.print(f"    {name} = {option['default']}{choices}   {option['about']}", markup=False)
