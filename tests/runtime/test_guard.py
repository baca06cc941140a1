"""A checkpoint of ours without `import compress`: no way of loading it may end in a model with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import compress as run
from transformers import AutoModelForCausalLM

from compress.checkpoint import site_table
from compress.checkpoint.packed_source import PackedSource
from compress.interop import exporter as exporting

Tiny = Callable[..., Path]
STEPS = [{"match": "*.*", "method": "quant/rtn", "options": {"bits": 4, "group_size": 16}}]

CODE = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM, logging, pipeline
logging.set_verbosity_error()
logging.disable_progress_bar()
ways = {
    "AutoModelForCausalLM": lambda f: AutoModelForCausalLM.from_pretrained(f),
    "AutoModel": lambda f: AutoModel.from_pretrained(f),
    "pipeline": lambda f: pipeline("text-generation", model=f),
    "device_map": lambda f: AutoModelForCausalLM.from_pretrained(f, device_map="cpu"),
    "device_map auto": lambda f: AutoModelForCausalLM.from_pretrained(f, device_map="auto"),
    "ignore_mismatched_sizes": lambda f: AutoModelForCausalLM.from_pretrained(f, ignore_mismatched_sizes=True),
    "pipeline, ignoring": lambda f: pipeline("text-generation", model=f, model_kwargs={"ignore_mismatched_sizes": True}),
    "bfloat16": lambda f: AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16),
    "safetensors": lambda f: AutoModelForCausalLM.from_pretrained(f, use_safetensors=True),
}
outcome = {}
for folder in sys.argv[1:]:
    for name, load in ways.items():
        try:
            load(folder)
            outcome[f"{folder} {name}"] = "loaded"
        except Exception as error:
            outcome[f"{folder} {name}"] = f"{type(error).__name__}: {error}"
assert "compress" not in sys.modules
print(json.dumps(outcome))
"""


def without_compress(*folders: Path) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(CODE), *map(str, folders)]
    place = folders[0].parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=place)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_way_of_loading_fails_and_says_why(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # or device maps would fail for another reason
    for family in ("llama", "mixtral"):
        run(tiny(family), tmp_path / family, None, STEPS, max_shard_size="5GB" if family == "llama" else "30KB")
    exporting.export(exporting.prepare(str(tmp_path / "llama"), "awq"), tmp_path / "awq", lambda *_: None)
    exporting.export(exporting.prepare(str(tmp_path / "awq"), "native"), tmp_path / "converted", lambda *_: None)
    outcome = without_compress(tmp_path / "llama", tmp_path / "mixtral", tmp_path / "converted")
    assert len(outcome) == 27
    for way, what in outcome.items():
        assert what != "loaded", way
        assert "import-compress-first" in what, f"{way}: {what}"


def test_what_transformers_has_saved_again_fails_too(tiny: Tiny, tmp_path: Path) -> None:
    """It drops the name of the missing file; the empty tensor is left, which ignore_mismatched_sizes turns off."""
    run(tiny("llama"), tmp_path / "first", None, STEPS)
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    outcome = without_compress(tmp_path / "again")
    loaded = {way.split(" ", 1)[1] for way, what in outcome.items() if what == "loaded"}
    assert loaded <= {"ignore_mismatched_sizes", "pipeline, ignoring"}


def test_with_the_package_nothing_is_in_the_way(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("llama"), tmp_path / "out", None, STEPS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers_weights"] == site_table.IMPORT_FIRST
    assert not (tmp_path / "out" / site_table.IMPORT_FIRST).exists()
    assert site_table.FILE_KEY not in PackedSource.open_packed(tmp_path / "out").config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", ignore_mismatched_sizes=True)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "CompressedLinear"
    exporting.export(exporting.prepare(str(tmp_path / "out"), "awq"), tmp_path / "awq", lambda *_: None)
    assert site_table.FILE_KEY not in json.loads((tmp_path / "awq" / "config.json").read_text())


def test_a_checkpoint_with_the_older_name_of_the_absent_file_loads(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("llama"), tmp_path / "out", None, STEPS)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {site_table.FILE_KEY: "import-compress-first.safetensors"}))
    assert site_table.FILE_KEY not in PackedSource.open_packed(tmp_path / "out").config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "CompressedLinear"


def test_a_name_of_the_users_own_stays(tiny: Tiny, tmp_path: Path) -> None:
    """Only our own entry is taken out."""
    import shutil

    shutil.copytree(tiny("llama"), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "other" / "mine.safetensors")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {site_table.FILE_KEY: "mine.safetensors"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "other").config.vocab_size == 96
