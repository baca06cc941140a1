"""`compress push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands._options import Json


def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that compress wrote.")],
    repository: Annotated[str, typer.Argument(help="Where to, as user/name; created if it is not there.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see it, when it is created.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list the files with sizes, and stop.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    json_: Json = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub.

    Checksums are compared first, and files that name paths of this machine are refused. Repeating the command goes on where it
    was interrupted.
    """
    from compress.interop.hub import push as publish
    from compress.screen.checkpoints import show_push

    found = publish(folder, repository, private, dry_run, message)
    print(json.dumps(found.plain(), indent=2)) if json_ else show_push(found.plain())
