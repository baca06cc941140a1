"""The package as text: what laws over its source need to see of it."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from places import ROOT

PACKAGE = ROOT / "compress"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, str]:
    """The text of every module, by its name below `compress.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def room(module: str) -> str:
    """The room of a module: the first part of its name."""
    return module.partition(".")[0]


class Defined(NamedTuple):
    """A class or function and its name within the module, such as `Grid.encode`."""

    name: str
    node: ast.ClassDef | Function

    @property
    def lines(self) -> int:
        """From its first decorator to its end."""
        first = min([self.node.lineno, *(decorator.lineno for decorator in self.node.decorator_list)])
        return (self.node.end_lineno or first) - first + 1


def definitions(tree: ast.AST, inside: str = "") -> Iterator[Defined]:
    """Yield every class and function, also those within others."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function):
            name = f"{inside}.{node.name}".lstrip(".")
            yield Defined(name, node)
            yield from definitions(node, name)
        else:
            yield from definitions(node, inside)


def prose(text: str) -> Iterator[str]:
    """Yield each docstring, and each block of comments, with its lines joined and blanks folded."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and (docstring := ast.get_docstring(node)):
            yield " ".join(docstring.split())
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and block:
                yield " ".join(" ".join(block).split())
                block = []
            block.append(token.string.lstrip("#"))
            last = token.start[0]
    if block:
        yield " ".join(" ".join(block).split())


@cache
def literals(text: str) -> frozenset[str]:
    """Every string literal that is not a docstring or a piece of an f-string."""
    tree = ast.parse(text)
    skipped = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    skipped |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in skipped)
    return frozenset(node.value for node in constants if isinstance(node.value, str))
