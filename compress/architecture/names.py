"""Names of tensors on disk and of parameters in the model."""

from __future__ import annotations

from fnmatch import fnmatchcase

from compress.architecture.family import Family


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the globs matches."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def parameter_name(family: Family, name: str) -> str:
    """Return the name that a tensor, or a linear, has in the model of transformers."""
    if name in family.names:
        return family.names[name]
    if f"{name}.weight" in family.names:
        return family.names[f"{name}.weight"].removesuffix(".weight")
    for disk, module in family.renames:
        if disk:
            name = name.replace(disk, module, 1)
        elif not name.startswith(family.head + "."):
            name = module + name
    return name
