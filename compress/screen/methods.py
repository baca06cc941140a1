"""What there is to choose from."""

from __future__ import annotations

import sys
from typing import Any

from compress.screen.console import console


def describe_methods() -> dict[str, Any]:
    """All methods with their options, as JSON values."""
    from compress import registry

    found = {}
    for path in registry.methods():
        method = registry.method(path)
        module = sys.modules[method.__module__].__doc__ or ""
        schema = method.model_json_schema()["properties"]
        options = {
            k: {"default": v.get("default"), "choices": v.get("enum"), "about": v.get("description", "")}
            for k, v in schema.items()
        }
        found[path] = {
            "about": module.strip().splitlines()[0],
            "needs": [kind.__name__ for kind in method.may_need],
            "needs_by_default": [kind.__name__ for kind in method().needs],
            "options": options,
        }
    return found


def show_methods(found: dict[str, Any]) -> None:
    """Print the methods."""
    out = console()
    for path, method in found.items():
        always = ", ".join(method["needs_by_default"])
        needs = f" (needs calibration: {always})" if always else " (needs no data)"
        if method["needs"] and not always:
            needs = f" (needs no data; some options need calibration: {', '.join(method['needs'])})"
        out.print(f"[bold]{path}[/bold]{needs}\n  {method['about']}")
        for name, option in method["options"].items():
            choices = f", one of {', '.join(map(str, option['choices']))}" if option["choices"] else ""
            out.print(f"    {name} = {option['default']}{choices}   {option['about']}", markup=False)
