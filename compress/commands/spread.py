"""Groups of options: a command takes each as one parameter, and typer sees what is in it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command as typer has to see it: every parameter whose type is a dataclass stands for the options in it."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    types = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(types[name]):
            parameters.append(parameter.replace(annotation=types[name]))
            continue
        groups[name] = types[name]
        inner = get_type_hints(types[name], include_extras=True)
        parameters += [
            parameter.replace(name=field.name, default=field.default, annotation=inner[field.name])
            for field in fields(types[name])
        ]

    @functools.wraps(command)
    def spread_out(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    spread_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_out
