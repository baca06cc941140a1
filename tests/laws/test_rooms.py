"""The rooms of the package and their floors: who may import whom, compared with an AST walk over every file."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest
from places import ROOT

import compress

PACKAGE = ROOT / "compress"


class Room(NamedTuple):
    """What the modules of a room may import, names separated by blanks; `lazy` packages only inside functions."""

    rooms: str = ""  # other rooms, all of them on lower floors
    third: str = ""  # third-party packages
    lazy: str = ""


# From the ground up. A room imports from those that it names, at the top of a file, inside functions and for type checkers alike.
ROOMS: dict[str, Room] = {
    "errors": Room(),
    "_version": Room(),
    "system": Room("errors", "torch"),
    "registry": Room("errors"),
    "weights": Room("errors", "torch"),
    "formats": Room("weights errors", "torch"),
    "checkpoint": Room("weights registry system errors", "torch", "huggingface_hub"),
    "recipe": Room("registry system errors", "pydantic yaml"),
    "architecture": Room("checkpoint registry errors", "torch"),
    "calibration": Room("recipe checkpoint system errors", "torch numpy", "datasets huggingface_hub pyarrow transformers jinja2"),
    "report": Room("recipe weights system _version errors", "yaml jinja2", "matplotlib"),
    "model": Room("architecture checkpoint weights system errors", "torch", "transformers"),
    "methods": Room("calibration weights errors", "torch scipy pydantic"),
    "output": Room("architecture checkpoint system errors"),
    "kernels": Room("methods checkpoint formats weights registry errors", "torch numpy", "cupy"),
    "blockwise": Room("report methods calibration model architecture recipe checkpoint weights system errors", "torch"),
    "interop": Room(
        "output report model architecture checkpoint weights registry system _version errors",
        "torch yaml",
        "gguf huggingface_hub",
    ),
    "runtime": Room("kernels model architecture checkpoint weights errors", "torch transformers"),
    "verify": Room("interop blockwise report architecture checkpoint system errors", "torch numpy", "transformers"),
    "inspection": Room("interop model architecture checkpoint weights system errors", "torch"),
    "evaluation": Room(
        "verify interop blockwise report runtime kernels calibration model architecture recipe checkpoint weights system errors",
        "torch",
        "lm_eval transformers yaml",
    ),
    "structured_pruning": Room(
        "verify output blockwise report calibration model architecture recipe checkpoint system _version errors",
        "torch",
        "transformers",
    ),
    "runs": Room(
        "evaluation verify interop output blockwise report kernels methods calibration model architecture recipe checkpoint "
        "weights system _version errors",
        "torch yaml scipy",
        "numpy",
    ),
    "planning": Room(
        "runs blockwise report calibration model architecture recipe registry weights system _version errors",
        "torch numpy scipy yaml pydantic",
        "matplotlib",
    ),
    "api": Room("planning runs evaluation recipe checkpoint system errors"),
    "screen": Room("runs inspection evaluation interop report registry system errors", "rich"),
    "commands": Room(
        "screen api planning runs structured_pruning inspection evaluation verify interop report calibration architecture recipe "
        "registry system errors",
        "typer",
    ),
    "cli": Room("commands _version errors", "typer"),
    "__main__": Room("cli"),
    "": Room("api _version runtime errors", "", "transformers"),  # the package itself
}

# What holds for single modules in place of their room's row: modules as globs over full names, of their own room too.
MODULES: dict[str, Room] = {
    # A second reader of the format shares nothing with what writes it.
    "verify.raw_files": Room("system.side_files errors", "numpy"),
    "verify.second_reader": Room("verify.raw_files errors", "numpy"),
    # Methods see statistics and nothing else of calibration.
    "calibration.statistics": Room("errors", "torch"),
    "methods.*": Room("calibration.statistics methods.* weights errors", "torch scipy pydantic"),
    # Planners see numbers alone: what candidates take and cost.
    "planning.planners.*": Room("planning.problem planning.planners._* errors", "numpy scipy"),
    # Layouts of other tools see the parts of a weight, one at a time, and what opens and writes files of their kind.
    "interop.layouts.*": Room(
        "interop.layout interop.affine_grid interop.config_patterns interop.gguf_* interop.layouts._* checkpoint weights "
        "system.files errors",
        "torch",
    ),
}

# Floors within a room, from the ground up; an import goes to a lower one. Modules that no row names are above all rows.
WITHIN: dict[str, tuple[str, ...]] = {
    "methods": (
        "methods.method methods.block",
        "methods.solvers.*",
        "methods.pruning methods.retrain._options methods.transform._scaling",
        "methods.quant.* methods.prune.* methods.transform.* methods.tune.* methods.retrain.*",
    ),
    "architecture": ("architecture.family", "architecture.families.*"),
    "interop": (
        "interop.affine_grid interop.llama_cpp interop.config_patterns",
        "interop.gguf_blocks interop.foreign",
        "interop.gguf_file interop.layout",
        "interop.layouts.*",
    ),
    "planning": ("planning.problem", "planning.planners.*"),
}
SAME_FLOOR = ("methods.solvers.*", "methods.block")  # these may import from their own floor

# At the top of a file these load nothing heavy: the command line starts without torch.
LIGHT = ("errors", "_version", "registry", "commands.*", "cli", "__main__", "", "recipe.*", "screen.*", "system.progress")


WITHOUT_TORCH = ("system.files", "system.memory", "system.side_files")  # what these may import at their top in addition


class Import(NamedTuple):
    """One imported module, and whether it is loaded only when a function runs (or never, for type checkers)."""

    name: str
    lazy: bool
    line: int


def module_of(path: Path) -> str:
    """compress/methods/quant/gptq.py -> methods.quant.gptq; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Yield what a file imports; `from compress.methods.quant import gptq` counts as the module compress.methods.quant.gptq."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            inner = source.removeprefix("compress").removeprefix(".")
            whole = source.split(".")[0] == "compress" and (PACKAGE / inner.replace(".", "/")).is_dir()
            names = [f"{source}.{alias.name}" for alias in node.names] if whole else [source]
            yield from (Import(name, lazy, node.lineno) for name in names)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            yield from imports(node, lazy or function or types)


def room_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def matches(name: str, patterns: str) -> bool:
    """Whether a module is one of `patterns`, or in a room that they name."""
    return any(fnmatchcase(name, pattern) or room_of(name) == pattern for pattern in patterns.split())


def floor_within(module: str) -> int | None:
    """The floor of a module within its room, None for a room without floors."""
    rows = WITHIN.get(room_of(module))
    return rows and next((number for number, row in enumerate(rows) if matches(module, row)), len(rows))


def may_import(module: str, other: str) -> bool:
    """Whether a module of compress may import another one."""
    row = next((row for pattern, row in MODULES.items() if fnmatchcase(module, pattern)), None)
    if row is not None and not matches(other, row.rooms):
        return False
    if room_of(module) != room_of(other):
        return matches(other, (row or ROOMS[room_of(module)]).rooms)
    if other.rpartition(".")[2].startswith("_") and module.rpartition(".")[0] == other.rpartition(".")[0]:
        return True  # a private file of its own folder
    mine, theirs = floor_within(module), floor_within(other)
    if mine is None or theirs is None or mine > theirs or mine == len(WITHIN[room_of(module)]):
        return True
    return mine == theirs and any(fnmatchcase(module, pattern) for pattern in SAME_FLOOR)


def complaints(module: str, text: str) -> list[str]:
    """Return what is wrong with the imports of a module of this text."""
    if room_of(module) not in ROOMS:
        return [f"compress.{module}: its room is not in tests/laws/test_rooms.py; give it a row"]
    row = next((row for pattern, row in MODULES.items() if fnmatchcase(module, pattern)), ROOMS[room_of(module)])
    light = any(fnmatchcase(module, pattern) for pattern in LIGHT)
    found = []
    for name, lazy, line in imports(ast.parse(text)):
        place, top = f"compress.{module}:{line}: ", name.split(".")[0]
        inner = name.removeprefix("compress").removeprefix(".")
        if name.startswith("."):
            found.append(f"{place}relative import {name}; write `from compress...`")
        elif top == "compress":
            other = inner if inner in FILES else inner.rpartition(".")[0]
            if other != module and not may_import(module, other):
                found.append(f"{place}may not import {name}")
            elif light and not lazy and not any(fnmatchcase(other, pattern) for pattern in (*LIGHT, *WITHOUT_TORCH)):
                found.append(f"{place}may not import {name} at its top")
        elif top not in sys.stdlib_module_names and top not in row.third.split() and not (lazy and top in row.lazy.split()):
            found.append(f"{place}may not import {top}{'' if lazy or top not in row.lazy.split() else ' at its top'}")
    return found


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = sorted(module for module in FILES if module and FILES[module].name == "__init__.py")


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_are_those_of_the_table(module: str) -> None:
    assert complaints(module, FILES[module].read_text(encoding="utf-8")) == []


def test_the_table_names_what_is_there_and_goes_down() -> None:
    """Every row names rooms of lower rows, so that there is no circle; and every room is a folder or a module."""
    above: list[str] = []
    for room, row in ROOMS.items():
        assert room in FILES, f"{room}: no such room; take it out of the table"
        if room:
            assert set(row.rooms.split()) <= set(above), f"{room}: imports from its own floor or a higher one"
        above.append(room)
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, path in FILES.items():
        for found in imports(ast.parse(path.read_text(encoding="utf-8"))):
            used[room_of(module)].add(room_of(found.name.removeprefix("compress").removeprefix(".")))
            used[room_of(module)].add(found.name.split(".")[0])
    for room, row in ROOMS.items():
        for name in (*row.rooms.split(), *row.third.split(), *row.lazy.split()):
            assert name in used[room], f"{room}: imports nothing of {name}; take it out of the row"
    for pattern in (*MODULES, *(name for rows in WITHIN.values() for row in rows for name in row.split())):
        assert any(fnmatchcase(module, pattern) for module in FILES), f"{pattern}: no such module; take it out"


def test_no_two_modules_load_each_other() -> None:
    """Imports make no circle, those inside functions included, so that any module can be imported first."""
    graph: dict[str, list[str]] = {}
    for module, path in FILES.items():
        names = [i.name.removeprefix("compress.") for i in imports(ast.parse(path.read_text(encoding="utf-8")))]
        graph[module] = [name for name in (n if n in FILES else n.rpartition(".")[0] for n in names) if name in FILES and name]
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"circle of imports: {' -> '.join((*above, module))}"
        if module not in done:
            for other in graph[module]:
                if other != module:
                    visit(other, (*above, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_root_holds_seven_modules_at_most() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 7


def test_no_room_is_called_as_a_function_of_the_package() -> None:
    """Importing a room sets an attribute of the package, which would hide the function."""
    assert [name for name in compress.__all__ if name in ROOMS] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_in_one_sentence_what_it_is(folder: str) -> None:
    """The docstring of its `__init__.py`, which has nothing else, is also the room's row in docs/architecture.md."""
    tree = ast.parse(FILES[folder].read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree)
    assert len(tree.body) == 1
    assert doc
    assert len(doc.splitlines()) == 1
    if "." not in folder:
        assert f"| `{folder}/` | {doc} |" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_private_files_are_imported_from_their_own_folder_alone() -> None:
    found = []
    for module, path in FILES.items():
        for name, _, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            inner = name.removeprefix("compress.")
            parts = inner.split(".")
            private = next((n for n, part in enumerate(parts) if part.startswith("_") and not part.endswith("__")), None)
            folder = ".".join(parts[:private])
            if name.startswith("compress.") and private and folder != module.rpartition(".")[0]:
                found.append(f"compress.{module}:{line}: {name} is private to compress/{folder.replace('.', '/')}")
    assert found == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("methods.quant.gptq", "from compress.formats import bitpack", "may not import compress.formats.bitpack"),
        ("methods.quant.gptq", "from compress.methods.quant.rtn import rtn", "may not import compress.methods.quant.rtn"),
        ("methods.quant.gptq", "from compress.calibration import cache", "may not import compress.calibration.cache"),
        ("methods.solvers.outliers", "from compress.methods.pruning import NofM", "may not import compress.methods.pruning"),
        ("methods.method", "from compress.methods.solvers import outliers", "may not import compress.methods.solvers.outliers"),
        ("methods.quant.gptq", "def f():\n    import compress.checkpoint.source", "may not import compress.checkpoint.source"),
        ("formats.bitpack", "from compress.recipe import schema", "may not import compress.recipe.schema"),
        ("methods.quant.gptq", "from . import _grid", "relative import"),
        ("methods.quant.gptq", "from .._private import x", "relative import"),
        ("errors", "import torch", "may not import torch"),
        ("kernels.foo", "import cupy", "may not import cupy at its top"),
        ("methods.quant.gptq", "def f():\n    import cupy", "may not import cupy"),
        ("runs.run", "import rich.table", "may not import rich"),
        ("screen.plans", "import typer", "may not import typer"),
        ("checkpoint.tensor_file", "from pydantic import BaseModel", "may not import pydantic"),
        ("commands.plan", "import torch", "may not import torch"),
        ("commands.plan", "from compress.screen.plans import show_plan\nfrom compress.runs import run", "runs.run at its top"),
        ("model.streamed", "import transformers", "may not import transformers at its top"),
        ("verify.second_reader", "from compress.checkpoint import packing", "may not import compress.checkpoint.packing"),
        ("planning.planners.milp", "from compress.planning import budget", "may not import compress.planning.budget"),
        ("interop.layouts.awq", "from compress.interop.layouts import gptq", "may not import compress.interop.layouts.gptq"),
        ("architecture.families.qwen", "from compress.architecture.families import llama", "architecture.families.llama"),
        ("unheard_of", "", "its room is not in"),
    ],
)
def test_the_walk_finds(module: str, text: str, complaint: str) -> None:
    found = complaints(module, text)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("kernels.foo", "def compiled():\n    import cupy"),
        ("methods.quant.gptq", "import torch\nfrom compress.methods.solvers import uniform_grid"),
        ("methods.retrain.perp", "from compress.methods.retrain import _options"),
        ("screen.results", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from compress.runs.finish import Summary"),
        ("commands.plan", "class A:\n    def f(self):\n        from compress.runs import run"),
        ("methods.quant.gptq", "import json, os.path"),
    ],
)
def test_the_walk_lets_pass(module: str, text: str) -> None:
    assert complaints(module, text) == []


IMPORT_FIRST = """
import os, sys, traceback
failed = []
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__(module)
            if CHECKED:
                from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
                assert AUTO_QUANTIZER_MAPPING["compress"].__name__ == "CompressQuantizer"
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(module)
sys.exit(f"cannot be imported first: {failed}" if failed else 0)
"""


def import_each_first(modules: list[str], before: str, checked: bool) -> None:
    """Import modules of compress, each in a process forked from one that has run `before`, and look whether that worked."""
    names = [f"compress.{module}".rstrip(".") for module in modules]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    code = f"{before}\nCHECKED = {checked}\n{IMPORT_FIRST}"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_any_module_can_be_imported_first() -> None:
    """Each in a process of its own, forked from one that has loaded the libraries and nothing of the package.

    That imports make no circle says the same, and takes no time.
    """
    libraries = "import torch, numpy, scipy, pydantic, yaml, jinja2, rich.table, typer, transformers, transformers.modeling_utils"
    import_each_first([module for module in FILES if module != "__main__"], libraries, checked=False)


def test_modules_can_be_imported_before_transformers() -> None:
    """Those that load transformers, and some that do not: the format is registered while they are loading, or afterwards."""
    loading = [
        m
        for m, path in FILES.items()
        if any(i.name.startswith("transformers") and not i.lazy for i in imports(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    assert "runtime.quantizer" in loading
    import_each_first([*loading, "", "runtime.linear", "runtime.experts", "evaluation.quality"], "import torch", checked=True)
