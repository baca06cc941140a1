"""Before a run: dry runs, feasible budgets, plans of bits, rehearsals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.screen.console import console, table_of, with_error
from compress.system.files import duration, human_bytes

if TYPE_CHECKING:
    from compress.runs.prepared import PreparedRun


def describe_dry_run(run: PreparedRun) -> dict[str, Any]:
    """What a dry run says, as JSON values."""
    from compress.runs import estimate

    plan, expected, ids = run.plan, run.estimate, run.ids.shape
    devices = [] if expected.on_host else [estimate.free_on(plan.device)]
    kinds: dict[tuple[str, str, str], list[Any]] = {}
    for a in plan.assignments:
        shape = f"{a.site.shape[0]} x {a.site.shape[1]}"
        options = ", ".join(f"{key}={value}" for key, value in _main_options(a.method.model_dump()).items())
        kinds.setdefault((a.site.kind, shape, f"{a.method.path} {options}"), []).append(a)
    rows = []
    for (kind, shape, method), members in kinds.items():
        size = members[0].method.describe(members[0].site.shape)
        rows.append(
            {
                "kind": kind,
                "count": len(members),
                "shape": shape,
                "method": method,
                "bits_per_weight": size.most / members[0].site.numel if size.exact else None,
            }
        )
    untouched = len(plan.inventory.sites) - len(plan.assignments)
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
        "copied_tensors": len(plan.inventory.copied),
        "dropped_tensors": plan.inventory.dropped,
        "notes": plan.notes,
        "bytes_before": expected.bytes_before,
        "bytes_after": expected.bytes_after,
        "bytes_after_exact": expected.exact,
        "bytes_after_range": list(expected.range_after),
        "files_after": expected.files_after,
        "memory": expected.memory,
        "device_memory": expected.device_memory,
        "reload_memory": expected.reload_memory,
        "statistics": expected.statistics,
        "disk": expected.disk,
        "seconds": expected.seconds,
        "warnings": estimate.shortfall(expected, devices) + [finding.message for finding in run.findings],
        **({} if run.options.target is None else {"target": run.options.target}),
    }


_OPTIONS = ("sparsity", "pattern", "group", "within", "datatype", "bits", "group_size", "symmetric", "order", "range")
_OF_CODES = ("group_size", "symmetric")  # that mean nothing where values stay as they are


def _main_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method that fit into a table."""
    dense = "bits" in options and options["bits"] is None
    if "sparsity" in options and options["sparsity"] is None and options["pattern"] is None:
        options = {**options, "sparsity": 0.5}
    hidden = {*(_OF_CODES if dense else ()), *(("group",) if options.get("group") == 1 else ())}
    hidden |= {"within"} if options.get("pattern") else set()
    return {key: options[key] for key in _OPTIONS if options.get(key) is not None and key not in hidden}


def show_dry_run(found: dict[str, Any]) -> None:
    """Print what a run would do, and what it would take."""
    out = console()
    table = table_of(f"{found['model']} ({found['model_type']})", "kind", "count", "out x in", "bits", "method")
    for row in found["sites"]:
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        table.add_row(row["kind"], str(row["count"]), row["shape"], bits, row["method"])
    out.print(table)
    if found["afterwards"]:
        out.print(f"afterwards {', '.join(found['afterwards'])}")
    if found["transforms"]:
        out.print(f"before     {', '.join(found['transforms'])}")
    about = "" if found["bytes_after_exact"] else "about "
    size = human_bytes(found["bytes_before"])
    out.print(f"size       {size} -> {about}{human_bytes(found['bytes_after'])}{size_range(found['bytes_after_range'])}")
    out.print(f"files      {about}{found['files_after']:,} bytes of weight files")
    copied, dropped = found["copied_tensors"], len(found["dropped_tensors"])
    out.print(f"untouched  {found['untouched_linears']} linears, {copied} other tensors copied, {dropped} dropped")
    for note in found["notes"]:
        out.print(f"note       {note}", soft_wrap=True, markup=False)
    if found["calibration"]:
        out.print(f"data       {found['calibration']['samples']} windows of {found['calibration']['length']} tokens")
    out.print(
        f"memory     about {human_bytes(found['memory'])}, of which statistics {human_bytes(found['statistics'])} if all at once"
    )
    if found["device_memory"] is not None:
        out.print(f"on the GPU about {human_bytes(found['device_memory'])}")
    out.print(f"disk       about {human_bytes(found['disk'])} while it runs")
    if found["seconds"] is not None:
        out.print(
            f"time       about {duration(found['seconds'])}, to within a factor of two, from a probe of this machine just now:"
        )
        out.print("           if it gets busier, this takes longer; the run corrects what it shows by the blocks that are done")
    if times := {name: seconds for name, seconds in found.get("efforts", {}).items() if seconds is not None}:
        out.print("--effort   " + ", ".join(f"{name}: {duration(seconds)}" for name, seconds in times.items()))
    out.print(f"runs on    {found['device']} in {found['dtype']}")
    if found.get("target"):
        out.print(f"target     {found['target']} will load it" + (", see the warnings" if found["warnings"] else ""))
    for warning in found["warnings"]:
        out.print(f"warning    {warning}", soft_wrap=True)


def size_range(ends: Sequence[int]) -> str:
    """The range of a size that depends on the values of weights, as text that follows the size; empty where it is known."""
    least, most = map(human_bytes, ends)
    return "" if least == most else f", between {least} and {most} by what the weights are"


def show_feasibility(found: dict[str, Any]) -> None:
    """Print which budgets are possible."""
    out = console()
    table = table_of(f"{found['model']}: every weight by one candidate", "bits", "size", "weights", "memory", "all weights by")
    for row in found["candidates"]:
        about = "" if row["exact"] else "about "
        size, memory_ = about + human_bytes(row["bytes"]), human_bytes(row["memory"])
        size += "" if row["exact"] else f" ({human_bytes(row['least'])} to {human_bytes(row['most'])})"
        table.add_row(f"{row['bits_per_weight']:.4f}", size, f"{row['weights']:,}", memory_, row["candidate"])
    out.print(table)
    smallest, largest = human_bytes(found["smallest"]), human_bytes(found["largest"])
    out.print(f"possible   {smallest} to {largest}, from {human_bytes(found['bytes_before'])}; nothing was read but headers")
    if found["possible"] is False:
        out.print("warning    the budget is below what any candidate takes; ask for more, or give smaller --candidates")


def show_plan(found: dict[str, Any]) -> None:
    """Print a plan of bits, what it was chosen from, and how far its predictions can be trusted."""
    out = console()
    seen_by = {r["candidate"]: (r["measured"], r["standard_error"]) for r in found["references"]}
    rows: list[tuple[float, int, float, str, tuple[float, float | None] | None]] = []
    rows += [(p["bits_per_weight"], p["bytes"], p["kl"], "milp", None) for p in found["front"]]
    rows += [(u["bits_per_weight"], u["bytes"], u["kl"], u["candidate"], seen_by.get(u["candidate"])) for u in found["uniform"]]
    table = table_of("divergence against size", "bits", "size", "predicted KL", "measured KL", "all weights by")
    for bits, size, kl, what, seen in sorted(rows, key=lambda row: (row[0], row[3])):
        table.add_row(f"{bits:.4f}", human_bytes(size), f"{kl:.5f}", with_error(seen), what)
    out.print(table)
    counts: dict[str, int] = {}
    for label in found["choices"].values():
        counts[label] = counts.get(label, 0) + 1
    table = table_of("the plan", "weights", "method")
    for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(str(count), label)
    out.print(table)
    whole = human_bytes(found["bytes"]) + (
        "" if found["sizes_exact"] else " or about that: a method's size depends on the values"
    )
    out.print(f"plan         {found['bits_per_weight']:.4f} bits per weight, checkpoint {whole}, by {found['planner']}")
    check = "" if found["measured_kl"] is None else with_error((found["measured_kl"], found["measured_kl_standard_error"]))
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
        out.print(f"plot         {found['plot']}", soft_wrap=True)


def show_rehearsal(found: dict[str, Any]) -> None:
    """Print what was tried, and what would fail."""
    out = console()
    table = table_of(f"rehearsal of {found['model']}", "stage", "seconds", "")
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
