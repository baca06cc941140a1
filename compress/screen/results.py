"""What was made, and how good and fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from compress.screen.console import console, interval_text, table_of, with_error
from compress.system import memory
from compress.system.files import duration, human_bytes

if TYPE_CHECKING:
    from compress.evaluation.bench import Bench
    from compress.evaluation.quality import Quality
    from compress.runs.prepared import Outcome


def show_notes(notes: Sequence[str]) -> None:
    """Print what is worth saying before a run."""
    for note in notes:
        console().print(f"note       {note}", soft_wrap=True, markup=False)


def show_outcome(outcome: Outcome) -> None:
    """Print what a run gave."""
    from compress.report import same_size
    from compress.report.summary import reused

    v, quality, out = outcome.summary, outcome.quality, console()
    if outcome.resumed:
        out.print(f"{outcome.path} is there already, made by the same job", soft_wrap=True)
    table = table_of(str(outcome.path), "", "before", "after")
    table.add_row("size", human_bytes(v["bytes_before"]), human_bytes(v["bytes_after"]))
    table.add_row("bits per weight, whole file", f"{v['bytes_before'] * 8 / v['weights']:.3f}", f"{v['bits_per_weight']:.3f}")
    table.add_row(f"bits per weight, {v['sites']} compressed", "", f"{v['bits_per_compressed_weight']:.3f}")
    if quality is not None:
        _quality_rows(table, quality)
    out.print(table)
    if (pruned := same_size.compare(outcome.rows)) is not None:
        for place, sentence in zip(("pruned", ""), pruned.sentences, strict=False):
            out.print(f"{place:10} {sentence}", soft_wrap=True)
    fallbacks = f", {v['fallbacks']} weights by a fallback (see the report)" if v["fallbacks"] else ""
    out.print(f"{v['seconds']:.1f} s, {human_bytes(v['peak_memory'])} peak memory{fallbacks}")
    if quality is not None and (more := memory.peak()) > v["peak_memory"]:
        out.print(f"measuring  took more: {human_bytes(more)} peak memory")
    if (said := v.get("predicted")) and said["seconds"] is not None:
        files = sum(path.stat().st_size for path in outcome.path.glob("model*.safetensors*"))
        right = (
            f"{files:,} bytes of weight files, as predicted"
            if files == said["files_after"]
            else (f"{said['files_after']:,} bytes of weight files predicted, {files:,} written")
        )
        out.print(f"predicted  {duration(said['seconds'])}, {human_bytes(said['memory'])} peak memory; {right}")
    if v.get("cache"):
        out.print(f"cache      {reused(v['cache'])}", soft_wrap=True)
    out.print(f"checked    {_checked(v)}", soft_wrap=True)
    out.print(f"report     {outcome.path / 'report.html'}", soft_wrap=True)
    out.print(f'load with  import compress; AutoModelForCausalLM.from_pretrained("{outcome.path}")', soft_wrap=True)


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
        f"{q.perplexity:.3f}{interval_text(q.perplexity_interval, '.3f')}",
    )
    if q.perplexity_ratio is not None:
        ratio = f"{q.perplexity_ratio:.4f}{interval_text(q.perplexity_ratio_interval, '.4f')}"
        table.add_row("perplexity over the original's", "", ratio)
    if q.kl is not None:
        table.add_row("KL divergence (nats)", "", f"{q.kl:.5f}{interval_text(q.kl_interval, '.5f')}")
        table.add_row("top-1 agreement", "", f"{q.agreement:.2%}{interval_text(q.agreement_interval, '.2%')}")
    for name, score in (q.tasks or {}).items():
        before = "" if score["before"] is None else f"{score['before']:.3f}"
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
        kept = "" if score.get("retained") is None else f", {score['retained']:.0%} kept"
        table.add_row(f"{name} ({score['metric']})", before, f"{score['model']:.3f}{error}{kept}")
    if q.tokens_per_second is not None:
        before = "" if q.tokens_per_second_before is None else f"{q.tokens_per_second_before:.1f}"
        table.add_row("tokens per second, batch 1", before, f"{q.tokens_per_second:.1f}")


def show_quality(q: Quality) -> None:
    """Print a measurement."""
    out = console()
    table = table_of(f"{q.model} on {q.data}: {q.windows} windows of {q.length} tokens", "", "original", "model")
    table.add_row("size", "" if q.bytes_before is None else human_bytes(q.bytes_before), human_bytes(q.bytes))
    _quality_rows(table, q)
    out.print(table)
    if q.perplexity_interval is not None:
        out.print(f"in brackets: 95 % intervals by the bootstrap over {q.windows} windows", markup=False)
    if q.original is None:
        out.print("no original: give --original MODEL for KL divergence and agreement")


def show_bench(b: Bench) -> None:
    """Print how fast products are."""
    out = console()
    machine = f"copies {b.bytes_per_second / 1e9:,.4g} GB/s, products {b.operations_per_second / 1e12:.3g} TFLOP/s"
    table = table_of(
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


def show_curve(found: dict[str, Any]) -> None:
    """Print a sweep."""
    out = console()
    title = f"{found['model']} by {found['method']}: {found['windows']} windows of {found['length']} tokens"
    table = table_of(title, found["option"], "removed", "bits", "KL", "perplexity", "of the original's")
    for p in found["points"]:
        table.add_row(
            f"{p['setting']:g}" if isinstance(p["setting"], float | int) else p["setting"],
            f"{p['sparsity']:.2%}",
            f"{p['bits_per_weight']:.3f}",
            with_error((p["kl"], p["kl_standard_error"])),
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


def show_comparison(found: dict[str, Any]) -> None:
    """Print checkpoints by size, with a star at those that no other beats."""
    out = console()
    table = table_of("divergence against size", "checkpoint", "size", "bits", "measured KL", "agreement", "stored")
    for entry in found["checkpoints"]:
        kl = "" if entry["kl"] is None else f"{entry['kl']:.5f}{interval_text(entry['kl_interval'], '.5f')}"
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
    out = console()
    table = table_of("divergence with some of the weights dense", "made dense", "weights", "measured KL")
    for trial in found["trials"]:
        table.add_row(trial["what"], str(trial["sites"]), f"{trial['kl']:.5f}")
    out.print(table)
    for what, kl in ((found["block"], found["block_kl"]), (found["site"], found["site_kl"])):
        share = 1 - kl / found["kl"] if found["kl"] > 0 else 0.0
        out.print(
            f"hurts most: {what}, without which {kl:.5f} nats of {found['kl']:.5f} are left ({share:.0%} less)", soft_wrap=True
        )
