"""Plots of a plan, by matplotlib: which weight gets how many bits, and divergence against size."""

from __future__ import annotations

from pathlib import Path

from compress.errors import OutputError, RecipeError
from compress.planning import Planned

_KINDS = 24  # rows of the upper plot, at most


def available() -> bool:
    """Whether there is matplotlib."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def plot(planned: Planned, path: Path) -> None:
    """Write both plots into one file, of the kind that its name says. Raises RecipeError, OutputError."""
    if not available():
        raise RecipeError("--plot: needs matplotlib; pip install 'compress[plot]', or leave --plot out")
    from matplotlib.backends import backend_svg  # noqa: F401
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
    try:
        figure.savefig(path)
    except ValueError as error:
        raise RecipeError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
