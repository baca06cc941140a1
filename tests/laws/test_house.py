"""The laws of the house: one walk, words where they belong, sizes, one name for one thing, and nothing half registered.

Each law is a function from the name and the text of a module to what is against it. What is still against a law is in
`exceptions.toml`. Its lists may only shrink: an entry that is no longer needed fails, too.
"""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import pytest
from package_text import Function, definitions, literals, modules, room
from places import ROOT, TESTS

from compress import registry

MODULES = modules()
EXCEPTIONS: dict[str, list[str]] = tomllib.loads((TESTS / "laws" / "exceptions.toml").read_text(encoding="utf-8"))
WORDS = {*registry.names("formats"), "base", "keep", "outliers", "low_rank", "input"}  # formats, and roles of parts
METHOD_KINDS = ("quant", "prune", "transform", "tune", "retrain")
LINES, FUNCTION, CLASS, METHODS, PARAMETERS = 400, 60, 200, 15, 8


def compare(found: Iterable[str], law: str) -> None:
    """Fail where something is against a law and no exception, or where an exception is no longer needed."""
    found, known = set(found), set(EXCEPTIONS[law])
    assert sorted(found - known) == [], f"against the law {law!r}, and not among its exceptions"
    assert sorted(known - found) == [], f"exceptions to the law {law!r} that are no longer needed: delete them from the list"


# ---------------------------------------------------------------------------------------------------- 4: one walk


def walks(module: str, text: str) -> set[str]:
    """Blocks that are loaded and released outside of the walk, and hooks outside of those who may set them."""
    tree = ast.parse(text)
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    homes = {
        "load": ("blockwise.walk", "model.streamed"),
        "release": ("blockwise.walk", "model.streamed"),
        "register_forward_pre_hook": ("calibration.observe", "model.expert_loop", "model.reads", "model.rounded_inputs"),
    }
    found = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, node.func.value
        of_a_module = isinstance(owner, ast.Name) and owner.id in imported
        if module not in homes.get(name, (module,)) and not of_a_module:
            found.add(f"{module}: {name}")
    return found


def test_one_walk() -> None:
    compare({found for module, text in MODULES.items() for found in walks(module, text)}, "walk")


# ---------------------------------------------------------------------------------------------------- 5: words of the format


def words_of_the_format(module: str, text: str) -> set[str]:
    """Names of formats and roles of parts as literals, where nothing is stored or read."""
    if room(module) in ("formats", "weights", "interop") or module in ("checkpoint.packing", "verify.second_reader"):
        return set()
    return {f"{module}: {word}" for word in literals(text) if word in WORDS}


def test_words_of_the_format_live_with_the_format() -> None:
    compare({found for module, text in MODULES.items() for found in words_of_the_format(module, text)}, "words of the format")


# ---------------------------------------------------------------------------------------------------- 6: names of entries


@cache
def homes_of_entries() -> dict[str, set[str]]:
    """The modules that what recipes and commands name may be named in, by `name` and, of methods, `kind/name`."""
    homes = defaultdict(set)
    for kind in (*METHOD_KINDS, "plan", "export"):
        for name in registry.names(kind):
            homes[name].add(f"{registry.PACKAGES[kind]}.{name}")
            if f"{kind}/{name}" in registry.methods():
                homes[f"{kind}/{name}"] = homes[name]
    return homes


def names_of_entries(module: str, text: str) -> set[str]:
    """Methods, planners and layouts as literals, outside of their own files. Formats are the law before."""
    homes = homes_of_entries()
    return {f"{module}: {word}" for word in literals(text) if word in homes and module not in homes[word]}


def test_no_entry_of_the_registry_is_named_outside_of_its_file() -> None:
    found = {name for module, text in MODULES.items() for name in names_of_entries(module, text)}
    defaults = {name for name in found if name.startswith(("commands.", "api: ", "recipe.build: ", "planning.pruning: "))}
    compare(defaults, "defaults of the command line")
    compare(found - defaults, "names of entries")


# ---------------------------------------------------------------------------------------------------- 7: sizes


def sizes(module: str, text: str) -> dict[str, set[str]]:
    """Files, functions, classes and parameter lists that are too large."""
    found: dict[str, set[str]] = {"files": set(), "functions": set(), "classes": set(), "parameters": set()}
    if text.count("\n") > LINES:
        found["files"].add(module)
    for defined in definitions(ast.parse(text)):
        place, node = f"{module}: {defined.name}", defined.node
        if isinstance(node, ast.ClassDef):
            if defined.lines > CLASS or sum(isinstance(inner, Function) for inner in node.body) > METHODS:
                found["classes"].add(place)
            continue
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(taken) - (bool(taken) and taken[0].arg in ("self", "cls"))
        if defined.lines > FUNCTION:
            found["functions"].add(place)
        if count > PARAMETERS:
            found["parameters"].add(place)
    return found


@pytest.mark.parametrize("what", ["files", "functions", "classes", "parameters"])
def test_sizes(what: str) -> None:
    """Parameters of a command or of the Python API are options, and those of an operator of torch its tensors: other lists."""
    found = {place for module, text in MODULES.items() for place in sizes(module, text)[what]}
    apart = {place for place in found if place.startswith(("commands.", "api: "))}
    if what == "parameters":
        operators = {place for place in found if place.startswith("kernels.") and place.endswith(("_op", ": _", "_kernel"))}
        compare(operators, "parameters of operators")
        found -= operators
    if what in ("functions", "parameters"):
        compare(apart, f"{what} of commands")
        found -= apart
    compare(found, what)


# ---------------------------------------------------------------------------------------------------- 8: one name, one thing


def names_in_two_rooms(texts: Mapping[str, str]) -> set[str]:
    """Public classes and functions that have the name of another one in another room."""
    rooms = defaultdict(set)
    for module, text in texts.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                rooms[node.name].add(room(module))
    return {name for name, places in rooms.items() if len(places) > 1}


def test_one_name_is_one_thing() -> None:
    compare(names_in_two_rooms(MODULES), "names in two rooms")


# -------------------------------------------------------------------------------- 9: nothing is half registered


def needed(kind: str, name: str) -> list[tuple[str, str]]:
    """Files that an entry needs, as patterns, each with what must be written in one of them; "" for nothing but the file."""
    if kind in METHOD_KINDS:
        return [
            (f"tests/methods/{kind}/test_{name}.py", ""),
            ("docs/all-methods.md", f"| `{kind}/{name}` |"),
            ("recipes/*.yaml", f"{kind}/{name}"),
        ]
    shown = name.replace("_", "-")
    return {
        "formats": [(f"tests/support/examples/{name}.py", "GOLDEN"), ("docs/format.md", f"`{name}`")],
        "plan": [("tests/planning/test_*.py", f'"{name}"'), ("docs/methods.md", name)],
        "export": [("tests/interop/test_*.py", f'"{shown}"'), ("docs/export.md", shown)],
        "families": [("tests/support/tiny.py", f'"{name}')],
        "kernels": [("tests/[kr]*/test_*.py", name), ("docs/kernels.md", name)],
    }[kind]


def missing(kind: str, name: str, read: Callable[[str], list[str]]) -> list[str]:
    """What an entry lacks; `read` gives the texts of the files of a pattern."""
    return [
        f"{kind}/{name}: no {pattern}" + (f" has {words}" if words else "")
        for pattern, words in needed(kind, name)
        if not any(words.lower() in text.lower() for text in read(pattern))
    ]


def in_the_repository(pattern: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("kind", registry.KINDS)
def test_entries_have_test_recipe_and_page(kind: str) -> None:
    assert [lack for name in registry.names(kind) for lack in missing(kind, name, in_the_repository)] == []


# ---------------------------------------------------------------------------------------------------- that the laws find


LONG = "\n".join(f"    x = {n}" for n in range(FUNCTION))
MANY = ", ".join("abcdefghi")


@pytest.mark.parametrize(
    ("law", "module", "text", "found"),
    [
        (walks, "runs.pipeline", "def f(model):\n    model.load(3)", {"runs.pipeline: load"}),
        (walks, "runs.pipeline", "self.streamed.release(3)", {"runs.pipeline: release"}),
        (walks, "evaluation.quality", "m.register_forward_pre_hook(f)", {"evaluation.quality: register_forward_pre_hook"}),
        (walks, "runs.pipeline", "import json\njson.load(file)", set()),
        (walks, "blockwise.walk", "model.load(3)", set()),
        (walks, "calibration.observe", "m.register_forward_pre_hook(f)", set()),
        (words_of_the_format, "runtime.linear", 'spec["base"]', {"runtime.linear: base"}),
        (words_of_the_format, "kernels.int8", 'if x == "bitpack": pass', {"kernels.int8: bitpack"}),
        (words_of_the_format, "kernels.int8", '"""bitpack"""\nx = f"{y} bitpack"\nz = "bitpacked"', set()),
        (words_of_the_format, "formats.bitpack", 'x = "bitpack"', set()),
        (names_of_entries, "runs.pipeline", 'x = "gguf"', {"runs.pipeline: gguf"}),
        (names_of_entries, "methods.quant.rtn", 'x = "quant/gptq"', {"methods.quant.rtn: quant/gptq"}),
        (names_of_entries, "methods.quant.gptq", 'x = "quant/gptq", "gptq"', set()),
        (lambda m, t: sizes(m, t)["files"], "a.b", "\n" * 401, {"a.b"}),
        (lambda m, t: sizes(m, t)["functions"], "a.b", f"class A:\n  def f():\n{LONG}", {"a.b: A.f"}),
        (lambda m, t: sizes(m, t)["functions"], "a.b", f"def f():\n{LONG[LONG.index(chr(10)) + 1 :]}", set()),
        (lambda m, t: sizes(m, t)["classes"], "a.b", "class A:\n" + "  def f(): ...\n" * 16, {"a.b: A"}),
        (lambda m, t: sizes(m, t)["classes"], "a.b", "class A:\n" + "  x = 1\n" * 200, {"a.b: A"}),
        (lambda m, t: sizes(m, t)["parameters"], "a.b", f"def f({MANY}): ...", {"a.b: f"}),
        (lambda m, t: sizes(m, t)["parameters"], "a.b", f"class A:\n  def f(self, {MANY[3:]}): ...", set()),
        (lambda m, t: names_in_two_rooms({m: t, "c": t}), "a.b", "def f(): ...\ndef _g(): ...", {"f"}),
        (lambda m, t: names_in_two_rooms({m: t, "a.c": t}), "a.b", "class A: ...", set()),
    ],
)
def test_a_law_finds(law: Callable[[str, str], set[str]], module: str, text: str, found: set[str]) -> None:
    assert law(module, text) == found


@pytest.mark.parametrize(
    ("kind", "name", "files", "lacks"),
    [
        ("quant", "foo", {}, 3),
        ("quant", "foo", {"tests/methods/quant/test_foo.py": "x", "docs/all-methods.md": "| `quant/foo` |"}, 1),
        ("formats", "foo", {"tests/support/examples/foo.py": "GOLDEN = 1"}, 1),
        ("plan", "foo", {"tests/planning/test_*.py": '"foo"', "docs/methods.md": "foo"}, 0),
        ("export", "foo_bar", {"tests/interop/test_*.py": '"foo-bar"', "docs/export.md": "foo"}, 1),
    ],
)
def test_what_is_missing_is_found(kind: str, name: str, files: dict[str, str], lacks: int) -> None:
    assert len(missing(kind, name, lambda pattern: [files[pattern]] if pattern in files else [])) == lacks


@pytest.mark.parametrize(("found", "words"), [({"new"}, "not among"), (set(), "no longer needed")])
def test_lists_of_exceptions_only_shrink(found: set[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXCEPTIONS, "walk", [] if found else ["old"])
    with pytest.raises(AssertionError, match=words):
        compare(found, "walk")
