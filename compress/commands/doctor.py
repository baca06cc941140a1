"""`compress doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import Json, Quiet, Target, TensorParallel
from compress.commands._shared import progress


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint: dense, ours, or another tool's.")],
    target: Target = None,
    tensor_parallel: TensorParallel = 1,
    without_import: Annotated[
        bool, typer.Option("--without-import", help="As a program meets it that does not `import compress`.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is wrong with a checkpoint, and what to do about it.

    Files and index, checksums, the config against the tensors, NaN, the tokenizer, and which runtimes would load it. Ends with 0
    where nothing is wrong, and with 9 where something is.
    """
    from compress.inspection.doctor import diagnose
    from compress.screen.checkpoints import show_diagnosis

    with progress(quiet or json_) as shown:
        found = diagnose(folder, target, tensor_parallel, shown, registered=not without_import)
    print(json.dumps(found.plain(), indent=2)) if json_ else show_diagnosis(found)
    if not found.healthy:
        raise typer.Exit(9)
