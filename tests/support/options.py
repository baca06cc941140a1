"""The functions on tensors behind methods, with the defaults that the options of the method have."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any


def function_of(path: str) -> Callable[..., Any]:
    """The function of a method written as kind/name, which bears its name, with the method's own options as defaults."""
    kind, name = path.split("/")
    module = importlib.import_module(f"compress.methods.{kind}.{name}")
    function = getattr(module, name)
    asked = inspect.signature(function).parameters
    return functools.partial(function, **{n: o.default for n, o in module.METHOD.model_fields.items() if n in asked})


def bits_known(method: Any, shape: tuple[int, int]) -> int | None:
    """The bits that a method says a weight of this shape (out, in) will occupy; None where they depend on the values."""
    found = method.describe(shape)
    assert found.least <= found.likely <= found.most
    return found.most if found.exact else None
