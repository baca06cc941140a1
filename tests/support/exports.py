"""What exports of tiny models are made of, and what is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM

from compress.interop import exporter as exporting

PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


SIZES = {"hidden_size": 64, "intermediate_size": 96}


def rtn(match: str = "*.*", bits: int = 4, **options: Any) -> dict[str, Any]:
    return {"match": match, "method": "quant/rtn", "options": {"bits": bits, "group_size": 32, **options}}


FLOATS = {"datatype": "mxfp4", "compensate": False}


def quiet(*_: Any) -> None:
    pass


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        result: torch.Tensor = model(PROBE, use_cache=False).logits
    return result


RECIPES: dict[str, list[dict[str, Any]]] = {
    "symmetric": [rtn()],
    "asymmetric": [rtn(symmetric=False)],
    "3 bits": [rtn(bits=3)],
    "5 bits per row": [rtn(bits=5, group_size=-1)],
    "two widths, with the head": [rtn("*.self_attn.*", 8), rtn("*")],
    "act-order": [{"match": "*.*", "method": "quant/gptq", "options": {"bits": 4, "group_size": 32, "order": "desc_act"}}],
}


def export(model: Path, name: str, out: Path) -> dict[str, Any]:
    return exporting.export(exporting.prepare(str(model), name), out, quiet)


def parts(folder: Path) -> dict[str, Any]:
    source = exporting.open_packed(str(folder))
    return {site: source.compressed(site).base for site in source.table}


def equal_codes(first: dict[str, Any], second: dict[str, Any], scale_dtype: bool = True) -> None:
    """Codes, scales, zero points and groups are the same numbers; scales in the same type where that is asked for."""
    assert first.keys() == second.keys()
    for site, a in first.items():
        b = second[site]
        assert torch.equal(a.codes, b.codes), site
        assert torch.equal(a.scale.double(), b.scale.double()), site
        assert not scale_dtype or a.scale.dtype == b.scale.dtype
        assert (a.bits, a.group_size, a.bipolar) == (b.bits, b.group_size, b.bipolar)
        for x, y in ((a.zero, b.zero), (a.group, b.group)):
            assert (x is None) == (y is None), site
            assert x is None or torch.equal(x, y), site


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
