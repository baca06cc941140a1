"""`compress quantize` and `compress run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from compress.commands._options import BudgetFlags, DataFlags, DeliveryFlags, GroupSize, Model, Output, Quiet, RunFlags
from compress.commands._shared import progress, run_and_show, show_what_fits
from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.recipe.schema import Recipe


def quantize(
    model: Model,
    output: Output,
    *,
    method: Annotated[
        str | None, typer.Option(help="As `compress methods` lists it, gptq for short; after transforms: awq+gptq.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="Instead of a method: fast (no data), normal (default: scales, then GPTQ), best (trained).")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code, 1 to 8.")] = None,
    group_size: GroupSize = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Grid without or with zero points.")] = None,
    budget: BudgetFlags,
    text: DataFlags,
    recipe: Annotated[str | None, typer.Option(help="A recipe to start from: a file, or a name from `compress recipes`.")] = None,
    flags: RunFlags,
    delivery: DeliveryFlags,
    quiet: Quiet = False,
) -> None:
    """Quantize a model.

    compress quantize MODEL -o OUT --bits 4 --data text.jsonl

    With a budget instead of --bits, `compress plan` and `compress run` in one go:
    compress quantize MODEL -o OUT --bpw 2.75 --data text.jsonl
    """
    from compress import api
    from compress.recipe import build
    from compress.screen.plans import show_plan

    options, data, changes = flags.options(delivery), text.options(), flags.settings or ()
    efforts: dict[str, Recipe] = {}
    given = api.given_options(bits=bits, group_size=group_size, symmetric=symmetric)
    if budget.given:
        if chosen := [*(["effort"] if effort else []), *(["recipe"] if recipe is not None else []), *given]:
            raise RecipeError(api.not_with_budget(chosen[0]))
        if flags.dry_run:  # nothing is measured
            show_what_fits(model, data, budget.budget(), () if method is None else (method,), (), flags)
            return
        silent = quiet or flags.json_
        with progress(silent) as shown:
            planned = api.plan_before_run(model, output, budget.budget(), method, data, flags.dtype, options, shown)
        if not silent:
            show_plan(planned.planned.plain())
        made = api.changed_plan(planned, changes)
    elif recipe is None:

        def by(method: str) -> Recipe:
            return api.quantization_recipe(method, given, data=data, dtype=flags.dtype, changes=changes)

        made = by(build.method_of(method, effort))
        if method is None:
            efforts = {name: by(other) for name, other in build.EFFORTS.items()}
    elif method or effort or given:
        flag = "--method" if method else "--effort" if effort else "--" + next(iter(given)).replace("_", "-")
        raise RecipeError(f"{flag}: not with --recipe; change the recipe with --set, as in --set steps.0.options.bits=3")
    else:
        made = api.read_recipe(recipe, data=data, dtype=flags.dtype, changes=changes)
    run_and_show(made, model, output, options, flags, quiet, efforts)


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or a name from `compress recipes`.")],
    model: Model,
    output: Output,
    *,
    text: DataFlags,
    flags: RunFlags,
    delivery: DeliveryFlags,
    quiet: Quiet = False,
) -> None:
    """Run any recipe.

    compress run gptq-3bit MODEL -o OUT --data text.jsonl
    """
    from compress import api

    options = flags.options(delivery)
    made = api.read_recipe(recipe, data=text.options(), dtype=flags.dtype, changes=flags.settings or ())
    run_and_show(made, model, output, options, flags, quiet)
