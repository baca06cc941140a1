"""compress: make a language model smaller and keep it good.

Importing this package imports no torch. It registers the checkpoint format with transformers: at once where transformers'
quantizers are loaded already, otherwise at the moment they are.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress._version import __version__
from compress.errors import (
    CalibrationError,
    CheckpointError,
    CompressError,
    FormatError,
    KernelError,
    OutputError,
    RecipeError,
    ResumeError,
    VerificationError,
)

if TYPE_CHECKING:
    from compress.api import (
        Budget,
        DataOptions,
        Outcome,
        PlanResult,
        PruningOptions,
        Quality,
        RunOptions,
        evaluate,
        plan,
        prune,
        quantize,
        retrain,
        run,
    )

__all__ = [
    "Budget",
    "CalibrationError",
    "CheckpointError",
    "CompressError",
    "DataOptions",
    "FormatError",
    "KernelError",
    "Outcome",
    "OutputError",
    "PlanResult",
    "PruningOptions",
    "Quality",
    "RecipeError",
    "ResumeError",
    "RunOptions",
    "VerificationError",
    "__version__",
    "evaluate",
    "load",
    "plan",
    "prune",
    "quantize",
    "retrain",
    "run",
]

_HOST = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Waits for the module that holds transformers' table of quantizers and adds ours when it has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load_module(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Load the module that registers itself. Where it is being loaded already, which is how this hook can be reached, it will."""
    import compress.runtime.quantizer  # noqa: F401


def load(folder: str, **options: Any) -> Any:
    """Load a checkpoint, a folder or a Hub id: `AutoModelForCausalLM.from_pretrained(folder, **options)`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def __getattr__(name: str) -> Any:
    """Load the Python API, and torch with it, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from compress import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__]


if _HOST in sys.modules:
    _register()
elif not any(isinstance(finder, _RegisterAfter) for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterAfter())
