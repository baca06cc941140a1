"""The folder of families is their registry."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import registry
from compress.architecture import families
from compress.architecture.inventory import take_inventory
from compress.architecture.known import INFERRED, family_of, model_types
from compress.checkpoint.source import Source
from compress.model.detect import find_family

Tiny = Callable[..., Path]
TOY = """
from compress.architecture.family import Family

FAMILIES = (Family("toy_of_a_test"), Family("second_toy", tied=True))
"""


def test_a_file_in_the_folder_is_found_without_another_change(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "toy_of_a_test"}))
    makers = tmp_path / "makers"
    makers.mkdir()
    (makers / "toymaker.py").write_text(TOY)
    assert family_of("toy_of_a_test") is INFERRED
    try:
        with monkeypatch.context() as patch:
            patch.setattr(families, "__path__", [*families.__path__, str(makers)])
            assert {"toy_of_a_test", "second_toy", "llama"} <= set(model_types())
            source = Source.open(folder)
            family = find_family(source)
            assert family.model_type == "toy_of_a_test"
            assert len(take_inventory(source, family).sites) == 3 * 7 + 1
    finally:
        sys.modules.pop("compress.architecture.families.toymaker", None)
    assert "toy_of_a_test" not in model_types()


def test_no_model_type_is_written_twice() -> None:
    found = [family.model_type for maker in registry.names("families") for family in registry.lookup("families", maker)]
    assert sorted(found) == model_types()
    assert all(found)


def test_a_nested_family_differs_from_its_text_part_in_names_alone() -> None:
    text, whole = family_of("gemma3_text"), family_of("gemma3")
    assert (whole.taps, whole.keep, whole.scalings, whole.heads) == (text.taps, text.keep, text.scalings, text.heads)
    assert whole.blocks == "language_model.model.layers"
    assert whole.head == "language_model.lm_head"
    assert whole.outer == ("language_model.model.embed_tokens.weight", "language_model.model.norm.weight")
    assert whole.renames == (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"))
