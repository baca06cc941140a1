"""Who may import whom: a table, and an AST walk over every file that compares."""

from __future__ import annotations

import ast
import json
import os
import resource
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "compress"


class Row(NamedTuple):
    """What a module may import, names separated by blanks; `lazy` ones only inside functions or for type checkers."""

    own: str = ""  # modules of compress, as globs
    third: str = ""  # third-party packages
    lazy_own: str = ""
    lazy_third: str = ""


# By module below `compress`, as globs; an exact name goes before a glob. The order is from the bottom up.
TABLE: dict[str, Row] = {
    "_version": Row(),
    "errors": Row(),
    "memory": Row("errors"),
    "registry": Row("errors"),
    "files": Row("errors"),
    "parts.stream": Row(),
    "parts.kept": Row("", "torch"),
    "parts.*": Row("parts.stream parts.kept parts.uniform errors", "torch"),
    "weight": Row("errors", "torch"),
    "distributed": Row("errors", "torch"),
    "operators": Row("", "torch"),
    "container": Row("files errors", "torch"),
    "coded": Row("container errors", "torch"),
    "checkpoint": Row("coded container files errors", "torch", lazy_third="huggingface_hub"),
    "formats.*": Row("parts.* errors formats._*", "torch"),
    "packed": Row("registry checkpoint container weight errors", "torch"),
    "kernels.*": Row("kernels.* operators packed formats.* parts.* weight errors", "torch numpy", lazy_third="cupy"),
    # Layouts of other tools: pure functions on the parts of a weight, of which they see one at a time.
    "export._names": Row("packed errors", "torch"),
    "export._llama_cpp": Row("errors", "torch"),
    "export.*": Row("packed formats._bits parts.* weight errors export._*", "torch"),
    "foreign": Row("registry packed checkpoint container weight errors export._grid", "torch"),
    # Methods see tensors, statistics and their own options: no files, names, ranks or formats, and no other method.
    "calibration.statistics": Row("errors", "torch"),
    "method": Row("weight calibration.statistics errors", "torch pydantic"),
    "quant.*": Row("operators method parts.* weight calibration.statistics errors quant._*", "torch scipy pydantic"),
    "prune.*": Row("method parts.* weight calibration.statistics errors prune._* quant._*", "torch scipy pydantic"),
    # Planners see numbers alone: what candidates take and cost.
    "plan.*": Row("plan._* errors", "numpy scipy"),
    "transform.*": Row(
        "method parts.* weight calibration.statistics errors transform._* prune._* quant._*", "torch scipy pydantic"
    ),
    "tune.*": Row("method parts.* weight calibration.statistics errors quant._* tune._*", "torch scipy pydantic"),
    "retrain.*": Row(
        "method parts.* weight calibration.statistics errors retrain._* tune._* prune._* quant._*", "torch scipy pydantic"
    ),
    # Calibration deals in files, names and model code, never in methods.
    "recipe_data": Row("", "pydantic"),
    "recipe": Row("registry recipe_data errors", "pydantic yaml"),
    "calibration.documents": Row("recipe_data errors", "torch numpy", lazy_third="datasets huggingface_hub pyarrow"),
    "calibration.data": Row("calibration.documents recipe_data errors", "torch numpy", lazy_third="transformers jinja2"),
    "calibration.hidden": Row("container files errors", "torch"),
    "calibration.observe": Row("calibration.statistics errors", "torch"),
    "calibration.cache": Row("calibration.observe calibration.statistics container files errors", "torch"),
    "calibration.families": Row(),
    "calibration.layouts": Row("calibration.families", "torch"),
    "calibration.claims": Row(
        "calibration.families packed checkpoint container errors", "torch", lazy_own="calibration.inference"
    ),
    "calibration.experts": Row("calibration.families errors", "torch"),
    "calibration.skeleton": Row(
        "calibration.experts calibration.claims calibration.families calibration.uneven checkpoint memory errors",
        "torch",
        lazy_third="transformers",
    ),
    "calibration.uneven": Row("packed checkpoint errors", "torch"),
    "calibration.inference": Row(
        "calibration.experts calibration.families calibration.skeleton checkpoint errors", "torch", lazy_third="transformers"
    ),
    # The runtime and the evaluation know the stored form, not how it was made.
    "runtime.linear": Row("kernels.* packed parts.mixed weight errors", "torch"),
    "runtime.experts": Row("calibration.experts runtime.linear kernels.* errors", "torch"),
    "runtime.*": Row(
        "runtime.* calibration.experts calibration.claims calibration.families calibration.uneven kernels.* packed "
        "container weight errors",
        "torch transformers",
    ),
    # What a run leaves for people.
    "report": Row("files errors"),
    "charts": Row("report"),
    "same_size": Row("report parts.uniform"),
    "published": Row("recipe_data", "yaml"),
    "treemap": Row("files"),
    "front": Row("errors"),
    "drawing": Row("front charts files", lazy_third="matplotlib"),
    "facts": Row("charts report published recipe_data files errors", "yaml"),
    "notices": Row("facts charts report files"),
    "rendering": Row("files", "jinja2"),
    "card": Row("treemap drawing front rendering _version notices facts charts report files errors", "yaml"),
    # From here on modules know the whole of a run; the pipeline alone sees methods and formats together.
    "job": Row("files errors"),
    "biases": Row("calibration.claims calibration.families checkpoint container errors", "torch"),
    "prepare": Row(
        "biases calibration.data calibration.claims recipe recipe_data checkpoint distributed memory _version errors",
        "torch",
        "kernels.calibration",
    ),
    "block": Row(
        "calibration.families calibration.observe calibration.skeleton calibration.statistics method recipe report weight "
        "distributed memory errors",
        "torch",
    ),
    "scalings": Row("calibration.claims calibration.families method", "torch"),
    "orders": Row("scalings calibration.claims calibration.families calibration.layouts method", "torch"),
    "block_methods": Row(
        "block orders scalings method calibration.claims calibration.hidden calibration.observe calibration.skeleton "
        "calibration.statistics recipe weight distributed memory errors",
        "torch",
    ),
    "students": Row("packed job report weight calibration.claims checkpoint container files errors", "torch"),
    # The whole model, which methods of retraining see as they see a block.
    "retraining": Row(
        "students recipe retrain._blockwise retrain._moving calibration.families calibration.skeleton calibration.statistics "
        "files errors",
        "torch",
    ),
    "sizes": Row("seal recipe packed calibration.claims checkpoint container errors"),
    "timing": Row("prepare block calibration.claims calibration.statistics errors", "torch scipy"),
    "estimate": Row(
        "sizes timing prepare block recipe calibration.claims calibration.skeleton calibration.statistics memory files errors",
        "torch",
    ),
    "watching": Row("calibration.hidden calibration.skeleton errors", "torch"),
    "pipeline": Row(
        "watching students block block_methods weight job _version calibration.cache calibration.data calibration.hidden "
        "calibration.observe calibration.skeleton packed recipe report container distributed files",
        "torch",
    ),
    # Planning: what candidates cost is measured as a run would compress, then a planner decides.
    "candidates": Row("recipe registry calibration.families errors", "yaml pydantic"),
    "streams": Row("block block_methods memory recipe report calibration.observe calibration.skeleton", "torch"),
    "sensitivity": Row("streams candidates prepare recipe calibration.families calibration.skeleton", "torch"),
    "measurement": Row(
        "sensitivity streams block candidates prepare recipe calibration.families calibration.skeleton calibration.statistics "
        "memory files errors",
        "torch",
    ),
    "measured": Row(
        "measurement sensitivity streams candidates prepare calibration.data _version files errors",
        "torch",
    ),
    "folding": Row(),
    "distribution": Row(
        "block prepare recipe folding calibration.families calibration.observe calibration.skeleton calibration.statistics",
        "torch",
    ),
    "planning": Row(
        "sensitivity measured streams candidates folding plan._* prepare recipe registry calibration.data "
        "calibration.families _version files errors",
        "torch numpy yaml",
    ),
    "outlook": Row("planning prepare estimate sizes recipe errors"),
    "sweep": Row("streams candidates prepare recipe report calibration.skeleton files errors", "torch"),
    "shares": Row("planning measured sensitivity candidates distribution prepare recipe errors"),
    "plots": Row("planning sweep errors", lazy_third="matplotlib"),
    "seal": Row("packed calibration.claims calibration.families checkpoint container files errors"),
    # A second reader of the format shares nothing with what writes it.
    "evaluate.stored": Row("errors", "numpy"),
    "evaluate.independent": Row("evaluate.stored errors", "numpy"),
    "evaluate.recorded": Row("published files errors"),
    "evaluate.exported": Row(
        "evaluate.independent evaluate.stored evaluate.recorded gguf_file foreign packed parts.dense weight checkpoint container "
        "errors"
    ),
    "evaluate.speed": Row("errors", "torch", lazy_third="transformers"),
    "evaluate.bench": Row(
        "evaluate.quality evaluate.speed runtime.linear kernels.* parts.* foreign packed weight errors",
        "torch",
    ),
    "evaluate.*": Row(
        "evaluate.* prepare packed foreign calibration.* checkpoint container published recipe_data memory files errors",
        "torch",
        "card",
        "lm_eval transformers yaml",
    ),
    "inspection": Row("evaluate.quality calibration.claims packed foreign checkpoint errors"),
    # A checkpoint that is there, in another layout.
    # What runtimes can load, from descriptions alone.
    "targets": Row("registry export._llama_cpp packed calibration.claims calibration.families checkpoint errors"),
    "gguf_file": Row("export._* export.gguf packed seal calibration.claims _version errors", "torch", lazy_third="gguf"),
    "export_card": Row("facts rendering checkpoint", "yaml"),
    "exporting": Row(
        "export_card published gguf_file registry foreign packed parts.table weight seal "
        "calibration.claims calibration.families checkpoint container files "
        "_version errors",
        "torch",
    ),
    "difference": Row("foreign packed parts.uniform calibration.claims calibration.families checkpoint errors", "torch"),
    "diagnosis": Row(
        "gguf_file foreign packed targets calibration.claims calibration.skeleton checkpoint container files errors",
        "torch",
    ),
    "run": Row(
        "pipeline retraining students seal job prepare biases estimate card published report recipe packed calibration.skeleton "
        "evaluate.* distributed memory files _version errors",
        "torch yaml",
    ),
    "push": Row("published files errors", lazy_third="huggingface_hub"),
    # Whole heads, channels and blocks: a plain checkpoint comes out.
    "importance": Row("", "torch"),
    "smaller": Row("importance calibration.claims calibration.families checkpoint errors"),
    "groups": Row("importance smaller calibration.families calibration.layouts", "torch"),
    "cutter": Row("groups importance smaller calibration.* checkpoint errors", "torch"),
    "cutting": Row(
        "cutter groups smaller published seal job prepare recipe_data calibration.* checkpoint container evaluate.* memory files "
        "_version errors",
        "torch",
        lazy_third="transformers",
    ),
    "rehearsal": Row(
        "exporting run pipeline estimate prepare recipe recipe_data calibration.claims checkpoint container files errors",
        "torch",
        lazy_third="numpy",
    ),
    # What people see. The command line starts without anything heavy.
    "screen": Row(),
    "screen.*": Row(
        "screen.console files memory errors",
        "rich",
        lazy_own="registry recipe prepare estimate run inspection same_size evaluate.quality evaluate.bench facts targets "
        "difference diagnosis",
    ),
    "options": Row("", "typer"),
    "commands.*": Row("commands._shared options errors", "typer", lazy_own="*", lazy_third="torch"),
    "cli": Row("commands.* _version errors", "typer"),
    "__main__": Row("cli"),
    "": Row("_version", lazy_own="runtime.quantizer", lazy_third="transformers"),
}


class Import(NamedTuple):
    """One imported module, and whether it is loaded only when a function runs (or never, for type checkers)."""

    name: str
    lazy: bool
    line: int


def module_of(path: Path) -> str:
    """compress/quant/gptq.py -> quant.gptq; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_package(module: str) -> bool:
    return (PACKAGE / module.replace(".", "/")).is_dir()


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Yield what a file imports; `from compress.quant import gptq` counts as the module compress.quant.gptq."""
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


def row_of(module: str) -> Row | None:
    if module in TABLE:
        return TABLE[module]
    return next((row for pattern, row in TABLE.items() if "*" in pattern and fnmatchcase(module, pattern)), None)


def allowed(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def complaints(module: str, text: str) -> list[str]:
    """Return what is wrong with the imports of a module of this text."""
    row = row_of(module)
    if row is None:
        return [f"compress.{module}: not in the table of tests/test_imports.py; give it a row"]
    found = []
    for name, lazy, line in imports(ast.parse(text)):
        place = f"compress.{module}:{line}: "
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{place}relative import {name}; write `from compress...`")
        elif top == "compress":
            inner = name.removeprefix("compress").removeprefix(".")
            if not (allowed(inner, row.own) or (lazy and allowed(inner, row.lazy_own))):
                found.append(f"{place}may not import {name}{'' if lazy else ' at its top'}")
        elif not (top in sys.stdlib_module_names or allowed(top, row.third) or (lazy and allowed(top, row.lazy_third))):
            found.append(f"{place}may not import {top}{'' if lazy else ' at its top'}")
    return found


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
EMPTY = {module for module in FILES if module and is_package(module)}  # packages below compress have an empty __init__.py


@pytest.mark.parametrize("module", sorted(set(FILES) - EMPTY))
def test_imports_are_those_of_the_table(module: str) -> None:
    assert complaints(module, FILES[module].read_text(encoding="utf-8")) == []


def test_packages_are_folders_and_nothing_more() -> None:
    assert [module for module in EMPTY if FILES[module].read_text(encoding="utf-8").strip()] == []


def test_the_table_names_what_is_there() -> None:
    for pattern, row in TABLE.items():
        for name in [pattern, *row.own.split(), *row.lazy_own.split()]:
            assert any(fnmatchcase(module, name) for module in FILES), f"{name}: no such module; take it out of the table"


def test_no_two_modules_load_each_other() -> None:
    """Imports at the top of files make no circle, so any module can be imported first."""
    graph = {}
    for module, path in FILES.items():
        found = [i.name.removeprefix("compress.") for i in imports(ast.parse(path.read_text(encoding="utf-8"))) if not i.lazy]
        graph[module] = [name for name in found if name in FILES]
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"circle of imports: {' -> '.join((*above, module))}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("quant.gptq", "from compress.formats import bitpack", "may not import compress.formats.bitpack"),
        ("quant.gptq", "from compress.quant.rtn import rtn", "may not import compress.quant.rtn"),
        ("quant.gptq", "def f():\n    import compress.checkpoint", "may not import compress.checkpoint"),
        ("formats.bitpack", "from compress import recipe", "may not import compress.recipe"),
        ("quant.gptq", "from . import _grid", "relative import"),
        ("quant.gptq", "from .._private import x", "relative import"),
        ("errors", "import torch", "may not import torch at its top"),
        ("kernels.foo", "import cupy", "may not import cupy at its top"),
        ("quant.gptq", "def f():\n    import cupy", "may not import cupy"),
        ("run", "import rich.table", "may not import rich"),
        ("screen.plans", "import typer", "may not import typer"),
        ("container", "from pydantic import BaseModel", "may not import pydantic"),
        ("commands.plan", "import torch", "may not import torch at its top"),
        ("commands.plan", "from compress.screen.plans import show_plan", "may not import compress.screen.plans at its top"),
        ("calibration.skeleton", "import transformers", "may not import transformers at its top"),
        ("unheard_of", "", "not in the table"),
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
        ("quant.gptq", "import torch\nfrom compress.quant import _grid"),
        ("screen.results", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from compress.run import Summary"),
        ("commands.plan", "class A:\n    def f(self):\n        from compress import run"),
        ("quant.gptq", "import json, os.path"),
    ],
)
def test_the_walk_lets_pass(module: str, text: str) -> None:
    assert complaints(module, text) == []


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter beside the repository and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "transformers", "numpy", "rich.table", "datasets", "scipy", "yaml", "matplotlib")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, compress; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).strip() == "[]"


def test_help_of_every_command_loads_nothing_heavy() -> None:
    """Also `compress recipes`, which only reads YAML, loads no torch."""
    code = f"""
    import contextlib, io, json, sys
    from compress import cli
    commands = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
    texts = {{}}
    for arguments in (["--help"], *([name, "--help"] for name in commands)):
        sys.argv = ["compress", *arguments]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main()
        texts[" ".join(arguments)] = out.getvalue()
    heavy = [name for name in {HEAVY} if name in sys.modules]
    sys.argv = ["compress", "recipes"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main()
    print(json.dumps([texts, heavy, "torch" in sys.modules]))
    """
    texts, heavy, torch = json.loads(python(code))
    assert heavy == []
    assert not torch
    assert {"quantize", "run", "plan", "inspect", "eval", "verify", "methods", "recipes"} <= {text.split()[0] for text in texts}
    for command, text in texts.items():
        assert text.startswith("Usage: "), command
    assert "130 interrupted" in " ".join(texts["--help"].split())


def test_help_answers_at_once() -> None:
    """In processor time: what else the machine does must not decide."""

    def used() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    def seconds() -> float:
        before = used()
        subprocess.run([sys.executable, "-m", "compress", "--help"], cwd=ROOT, check=True, capture_output=True)
        return used() - before

    assert min(seconds() for _ in range(5)) < 0.3


REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["compress"].__name__ == "CompressQuantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["compress"].__name__ == "CompressConfig"
"""


@pytest.mark.parametrize("first", ["compress", "transformers"])
def test_the_format_is_registered_whichever_comes_first(first: str) -> None:
    """And importing a second time, or reloading, before and after, does no harm."""
    again = "import importlib, compress; importlib.reload(compress)\n"
    code = (
        f"import transformers.quantizers.auto\n{again}"
        if first == "transformers"
        else f"{again}assert 'torch' not in sys.modules\n"
    )
    python(f"import sys\n{code}{REGISTERED}{again}import compress{REGISTERED}print(compress.__version__)")


def test_the_wheel_holds_one_package() -> None:
    """A top-level package called `kernels` would hide the one that transformers looks for, and other names are as common."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    moved = wheel.get("sources", {})
    assert {moved.get(name, name).split("/")[0] for name in wheel["only-include"]} == {"compress"}
    assert all((ROOT / name).is_dir() for name in wheel["only-include"])
    # An editable install puts the repository itself on the path: there, too, only one folder may be a package.
    assert [path.parent.name for path in ROOT.glob("*/__init__.py")] == ["compress"]
    assert not {"kernels", "formats", "quant", "runtime"} & {path.name for path in ROOT.iterdir()}
    found = python("import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)").strip()
    assert not found.startswith(str(ROOT))
