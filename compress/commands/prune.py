"""`compress prune`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from compress.commands._options import DataFlags, GroupSize, Model, Output, Quiet, RunFlags
from compress.commands._shared import progress, run_and_show


@dataclass(frozen=True)
class PruningFlags:
    """What is removed, how, and from which weights: fields of `PruningOptions`."""

    sparsity: Annotated[float | None, typer.Option(help="Share of the weights to remove; 0.5 if nothing is said.")] = None
    pattern: Annotated[str | None, typer.Option(help="Instead, N:M as 2:4: N kept of every M neighbouring columns.")] = None
    group: Annotated[int | None, typer.Option(help="Neighbouring columns that go or stay together.")] = None
    within: Annotated[str | None, typer.Option(help="What competes: the weights of a row, or of a matrix.")] = None
    method: Annotated[
        str, typer.Option(help="alps, sparsegpt, wanda, ria, magnitude: see `compress methods`; after transforms: permute+alps.")
    ] = "alps"
    distribute: Annotated[
        str,
        typer.Option(help="uniform; owl: by outliers of blocks; global: by magnitude; measured: by what each weight costs."),
    ] = "uniform"
    scope: Annotated[list[str] | None, typer.Option(help="Weights to prune, as globs; all linears in blocks if not given.")] = (
        None
    )
    bits: Annotated[int | None, typer.Option(help="Also quantize what is kept, in the same pass, 2 to 8 bits.")] = None
    group_size: GroupSize = None
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Grid without or with zero points.")] = None
    retrain: Annotated[
        str | None, typer.Option(help="Then train every block on what the original's gives: perp, or ast, which moves masks too.")
    ] = None


def prune(model: Model, output: Output, *, pruned: PruningFlags, text: DataFlags, flags: RunFlags, quiet: Quiet = False) -> None:
    """Prune a model, and quantize it in the same pass with --bits.

    compress prune MODEL -o OUT --sparsity 0.6 --data text.jsonl

    Two of every four weights, in 4 bits:
    compress prune MODEL -o OUT --pattern 2:4 --bits 4 --data text.jsonl

    Channels put in an order first that keeps more of what matters:
    compress prune MODEL -o OUT --pattern 2:4 --method permute+alps --data text.jsonl

    What was lost learned back by norms and thin factors, which are merged:
    compress prune MODEL -o OUT --sparsity 0.6 --retrain perp --data text.jsonl
    """
    from compress import api

    values: dict[str, Any] = {**asdict(pruned), "scope": tuple(pruned.scope or ())}
    options = flags.options()  # no other layout has masks; `compress export --format dense` writes what was kept
    with progress(quiet or flags.json_ or pruned.distribute == "uniform") as shown:
        made = api.pruning_recipe(
            api.PruningOptions(**values),
            model,
            output,
            data=text.options(),
            dtype=flags.dtype,
            changes=flags.settings or (),
            options=options,
            progress=shown,
        )
    run_and_show(made, model, output, options, flags, quiet)
