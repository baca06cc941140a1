"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from compress._version import __version__
from compress.commands.bench import bench_command
from compress.commands.bisect import bisect
from compress.commands.compare import compare
from compress.commands.cut import cut
from compress.commands.diff import diff
from compress.commands.doctor import doctor
from compress.commands.evaluate import evaluate_command
from compress.commands.export import convert, export
from compress.commands.look import inspect, methods, recipes, verify
from compress.commands.plan import plan_command
from compress.commands.prune import prune
from compress.commands.push import push
from compress.commands.quantize import quantize, run
from compress.commands.rehearse import rehearse
from compress.commands.retrain import retrain
from compress.commands.spread import spread
from compress.commands.sweep import sweep_command
from compress.errors import CompressError

EXIT_CODES = """Exit codes: 0 done; 1 a bug; 2 wrong command line or recipe; 3 a checkpoint that cannot be read;
4 calibration data; 5 the job folder holds another job; 6 the result cannot be written; 7 verification failed; 8 a kernel;
9 `diff` or `doctor` found something; 130 interrupted."""

# All commands, by what they are for.
_TASKS: dict[str, dict[str, Callable[..., None]]] = {
    "Compress": {
        "quantize": quantize,
        "prune": prune,
        "run": run,
        "plan": plan_command,
        "rehearse": rehearse,
        "sweep": sweep_command,
        "cut": cut,
        "retrain": retrain,
    },
    "Look": {
        "inspect": inspect,
        "methods": methods,
        "recipes": recipes,
        "compare": compare,
        "diff": diff,
    },
    "Check": {
        "eval": evaluate_command,
        "bench": bench_command,
        "verify": verify,
        "doctor": doctor,
        "bisect": bisect,
    },
    "Publish": {
        "export": export,
        "convert": convert,
        "push": push,
    },
}


class _ByTask(TyperGroup):
    """Lists commands under what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each task."""
        for task, names in _TASKS.items():
            with formatter.section(task):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])


app = typer.Typer(
    name="compress",
    cls=_ByTask,
    help="Make a language model smaller and keep it good.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _terminated(*_: object) -> None:
    """End as after Ctrl-C: what is being written is cleaned up, and the same command goes on later."""
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; errors of the user's end in one message and an exit code of their own."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
    except CompressError as error:
        print(f"error: {error.message}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # what typer says about the command line
            error.show()
            raise SystemExit(2) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == 130:  # what typer makes of Ctrl-C, depending on its version
        print("interrupted; run the same command again to go on", file=sys.stderr)
    if isinstance(code, int) and code:
        raise SystemExit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for _name, _command in (pair for commands in _TASKS.values() for pair in commands.items()):
    _first = re.split(r"[.;:]\s", " ".join((_command.__doc__ or "").split()), maxsplit=1)[0]  # whole, not what fits a line
    app.command(_name, short_help=_first.rstrip("."))(spread(_command))
