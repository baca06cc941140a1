"""What starting costs: help and imports load nothing heavy, and the format is registered whichever comes first."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import textwrap
import tomllib

import pytest
from places import ROOT


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
    sections = [line.removesuffix(":") for line in texts["--help"].splitlines() if line.endswith(":") and line[0] != " "]
    assert [section for section in sections if section != "Options"] == ["Compress", "Look", "Check", "Publish"]
    listed = re.findall(r"^  ([a-z]+)  ", texts["--help"], re.MULTILINE)
    assert sorted(listed) == sorted(text.split()[0] for text in texts if text != "--help")


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
