"""Plots of plans and sweeps, by matplotlib: which weight gets how many bits, and what is lost against size or setting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import OutputError, RecipeError
from compress.planning.planner import Allocation
from compress.planning.sweep import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = 24  # rows of the upper plot, at most


def plot(planned: Allocation, path: Path) -> None:
    """Write both plots into one file, of the kind that its name says. Raises RecipeError, OutputError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 4))
    rows = {row.site: row for row in planned.sensitivity.sites}
    fields: dict[str, dict[int, list[float]]] = {}
    for site in planned.sites:
        bits = (rows[site.name].bits[planned.choices[site.name]] or 0) / site.numel
        fields.setdefault(site.kind, {}).setdefault(site.block or 0, []).append(bits)
    kinds, blocks = list(fields)[:_KINDS], max(b for row in fields.values() for b in row) + 1
    nothing = float("nan")
    grid = [[sum(v) / len(v) if (v := fields[kind].get(b, [])) else nothing for b in range(blocks)] for kind in kinds]
    image = upper.imshow(grid, aspect="auto", cmap="viridis")
    upper.set_yticks(range(len(kinds)), kinds)
    upper.set_xlabel("block")
    upper.set_title(f"bits per weight: {planned.point.bits_per_weight:.3f} on average, by {planned.planner}")
    figure.colorbar(image, ax=upper)

    lower.plot([p.bits_per_weight for p in planned.front], [p.kl for p in planned.front], "-", label="best plans (predicted)")
    same = planned.uniform
    lower.plot([p.bits_per_weight for _, p in same], [p.kl for _, p in same], "s", mfc="none", label="uniform (predicted)")
    sizes = {c: p.bits_per_weight for c, p in same}
    measured = [(sizes[r.candidate], r.measured) for r in planned.sensitivity.references if r.candidate in sizes]
    lower.plot([x for x, _ in measured], [y for _, y in measured], "x", label="uniform (measured)")
    lower.plot([planned.point.bits_per_weight], [planned.point.kl], "o", label=f"this plan: {planned.budget}")
    lower.set_yscale("log")
    lower.set_xlabel("bits per weight, every stored bit counted")
    lower.set_ylabel("KL to the original, nats")
    lower.grid(True, which="both", alpha=0.3)
    lower.legend()
    _save(figure, path)


def curve(found: Curve, path: Path) -> None:
    """Write perplexity and divergence by setting into one file of the kind of its name. Raises RecipeError, OutputError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    x = [p.setting if isinstance(p.setting, float | int) else k for k, p in enumerate(found.points)]
    upper.plot(x, [p.perplexity for p in found.points], "o-", label=found.method)
    upper.axhline(found.perplexity, color="black", linewidth=1, label="original")
    if found.knee is not None:
        upper.axvline(found.knee, color="gray", linestyle=":", label=f"knee at {found.knee:.3g}")
    upper.set_yscale("log")
    upper.set_ylabel("perplexity")
    upper.set_title(f"{found.model}: {found.method} over {found.option}")
    upper.legend()
    errors = [p.kl_standard_error or 0.0 for p in found.points]
    lower.errorbar(x, [p.kl for p in found.points], yerr=errors, fmt="o-")
    lower.set_yscale("symlog", linthresh=1e-4)
    lower.set_ylabel("KL to the original, nats")
    lower.set_xlabel(found.option)
    if not all(isinstance(p.setting, float | int) for p in found.points):
        lower.set_xticks(x, [str(p.setting) for p in found.points])
    for axes in (upper, lower):
        axes.grid(True, which="both", alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except ValueError as error:
        raise RecipeError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
