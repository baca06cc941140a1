"""Operators of torch.library whose arguments may be dataclasses of tensors and numbers.

torch.compile sees one node with the fields as arguments; what the operator does stays out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, get_type_hints

import torch
from torch import Tensor

P = ParamSpec("P")
_TYPES = {  # of arguments and fields, in the schema
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    str: "str",
    tuple[int, int]: "SymInt[]",
    tuple[int, ...]: "SymInt[]",
    tuple[Tensor, ...]: "Tensor[]",
}


def operator(name: str, shape: Callable[P, Sequence[int]]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Register a function as the operator `name`; arguments of its kind have the types above or are dataclasses of them.

    The result is new, of the type and on the device of the first argument, and of the shape that `shape` says.
    """

    def register(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        hints = get_type_hints(function)
        del hints["return"]
        kinds: list[Any] = [kind if is_dataclass(kind) else None for kind in hints.values()]
        parts = [None if kind is None else tuple(field.name for field in fields(kind)) for kind in kinds]
        schema = []
        for argument, kind in hints.items():
            inner = {f"{argument}_{field}": of for field, of in get_type_hints(kind).items()} if is_dataclass(kind) else {}
            schema += [f"{_TYPES[of]} {field}" for field, of in (inner or {argument: kind}).items()]

        def whole(values: tuple[Any, ...]) -> list[Any]:
            """Arguments from fields."""
            rest, found = iter(values), []
            for kind, names in zip(kinds, parts, strict=True):
                found.append(next(rest) if names is None else kind(*(_frozen(next(rest)) for _ in names)))
            return found

        def run(*values: Any) -> Tensor:
            return function(*whole(values))  # type: ignore[call-arg]

        def fake(*values: Any) -> Tensor:
            new: Tensor = values[0].new_empty(tuple(shape(*whole(values))))  # type: ignore[call-arg]
            return new

        op = torch.library.custom_op(name, run, mutates_args=(), schema=f"({', '.join(schema)}) -> Tensor")
        op.register_fake(fake)

        def call(*arguments: Any) -> Tensor:
            values: list[Any] = []
            for argument, names in zip(arguments, parts, strict=True):
                values += [argument] if names is None else [getattr(argument, field) for field in names]
            result: Tensor = op(*values)
            return result

        return call  # type: ignore[return-value]

    return register


def _frozen(value: Any) -> Any:
    """A list, which torch makes of every sequence, as the tuple that the dataclass had."""
    return tuple(value) if isinstance(value, list) else value
