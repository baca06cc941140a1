"""A layout is one file: everything that names layouts finds a new one in the folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compress as run
from runs import steps

from compress.errors import VerificationError
from compress.interop import exporter, layouts
from compress.interop.delivery import Delivery
from compress.interop.layout import Layout
from compress.verify.verify import verify

Tiny = Callable[..., Path]
TOY = """
from pathlib import Path

from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import read_tensor
from compress.interop.layout import Layout
from compress.weights.dense import Dense
from compress.weights.weight import CompressedWeight


class Scheme:
    def __init__(self, shape):
        self.shape, self.scale = shape, "F32"


class Toy(Layout):
    name = "toy-layout"
    holds = "everything, doubled"
    readers = "the toys of a test"

    def scheme(self, spec, scale):
        return Scheme(tuple(spec["shape"]))

    def layout(self, scheme):
        import torch

        return {"twice": (torch.float32, scheme.shape)}

    def tensors(self, scheme, weight):
        return {"twice": 2 * weight.dequantize().float()}

    def config(self, schemes, dense, head):
        return {"quant_method": "toy"}

    def weights(self, folder, sites):
        entries = Source.open(folder).entries
        for site in sites:
            yield site, CompressedWeight(Dense(read_tensor(entries[f"{site}.twice"]) / 2))


EXPORT = Toy()
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Layout[Any]]]:
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toy_layout.py").write_text(TOY)
    monkeypatch.setattr(layouts, "__path__", [*layouts.__path__, str(tmp_path / "toys")])
    yield type(exporter.lookup("toy-layout"))
    sys.modules.pop("compress.interop.layouts.toy_layout", None)


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path) -> Path:
    run(tiny("llama"), tmp_path / "made", None, steps("quant/rtn", bits=4, group_size=16), dtype="float32")
    return tmp_path / "made"


def test_a_file_in_the_folder_is_a_layout_without_another_change(toy: Any, made: Path, tmp_path: Path) -> None:
    """Listed, chosen by name, written, read back, recorded, verified and described."""
    assert "toy-layout" in exporter.formats()
    assert Delivery(formats=("toy-layout",)).formats == ("toy-layout",)
    out = tmp_path / "out"
    exporter.export(exporter.prepare(str(made), "toy-layout"), out, lambda *_: None)
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {"quant_method": "toy"}
    assert "the toys of a test" in (out / "README.md").read_text()
    assert verify(out, "cpu", lambda *_: None)["decoded"] == 21


def test_a_site_that_is_not_written_or_reads_back_differently_is_an_error(
    toy: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy.weights

    def fewer(self: Any, folder: Path, sites: Any) -> Iterator[tuple[str, Any]]:
        yield from list(whole(self, folder, sites))[1:]

    def other(self: Any, folder: Path, sites: Any) -> Iterator[tuple[str, Any]]:
        for site, weight in whole(self, folder, sites):
            weight.base.values[0, 0] = torch.nan
            yield site, weight

    for wrong, message in ((fewer, "was not written"), (other, "reads back with other values")):
        monkeypatch.setattr(toy, "weights", wrong)
        with pytest.raises(VerificationError, match=message):
            exporter.export(exporter.prepare(str(made), "toy-layout"), tmp_path / "out", lambda *_: None)
        assert not (tmp_path / "out").exists()
