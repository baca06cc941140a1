"""Other tools' quantization of a model on given token ids, for bench/real.py; runs where the tool is installed, without compress.

python bench/peers.py TOOL MODEL OUT IDS.npy BITS GROUP_SIZE [--iterations 200] [--llama-cpp SCRIPT --work FOLDER]

Prints a JSON object: `checkpoint` is a folder with the weights that the tool's result stands for, in float32 or bfloat16, so that
all results are measured by one program; `block_bits` and `file_bits` count what the tool stores: codes, scales of 16 bits, zero
points, and everything else in 16 bits. Grids are symmetric with one scale per group, but for hqq, whose grids have offsets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

LLAMA_CPP = {4: "Q4_K_M", 3: "Q3_K_M", 2: "Q2_K"}
Options = argparse.Namespace


def llm_compressor(model: Any, ids: Tensor, options: Options) -> Any:
    """GPTQ with static act-order."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _oneshot(model, ids, [GPTQModifier(actorder="static", **_scheme(options))])


def llm_compressor_awq(model: Any, ids: Tensor, options: Options) -> Any:
    """AWQ, then nearest."""
    from llmcompressor.modifiers.awq import AWQModifier

    return _oneshot(model, ids, [AWQModifier(**_scheme(options))])


def _scheme(options: Options) -> dict[str, Any]:
    weights = {"num_bits": options.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": options.group_size}
    return {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def _oneshot(model: Any, ids: Tensor, steps: list[Any]) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, dataset=rows, recipe=steps, num_calibration_samples=len(ids), max_seq_length=ids.shape[1])
    from compressed_tensors.quantization import forward

    for module in model.modules():  # what a loaded model multiplies with
        if isinstance(module, nn.Linear) and (scheme := getattr(module, "quantization_scheme", None)) is not None:
            zero = getattr(module, "weight_zero_point", None)
            if zero is None:
                zero = torch.zeros_like(module.weight_scale)
            module.weight.data = forward.fake_quantize(module.weight, module.weight_scale, zero, scheme.weights)
    return model


def auto_round(model: Any, ids: Tensor, options: Options) -> Any:
    """SignRound, 200 steps per block if nothing else is asked for."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        iters=options.iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=DataLoader(rows, batch_size=1),
        device_map="cpu",
    )
    return tool.quantize()[0]


def hqq(model: Any, ids: Tensor, options: Options) -> Any:
    """HQQ, which looks at no data."""
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    how = BaseQuantizeConfig(nbits=options.bits, group_size=options.group_size, axis=1)["weight_quant_params"]
    for module in (m for layer in model.model.layers for m in layer.modules() if isinstance(m, nn.Linear)):
        codes, grid = Quantizer.quantize(module.weight.data.clone(), device="cpu", compute_dtype=torch.float32, **how)
        module.weight.data = Quantizer.dequantize(codes, grid).to(module.weight)
    return model


def stored_bits(model: Any, bits: int, group_size: int, tool: str) -> dict[str, float]:
    """Bits per weight of the linears in blocks, and of all weights with the others in 16 bits."""
    offset = {"hqq-package": 16.0}.get(tool, 0.0)  # a zero point of 16 bits per group
    inside = bits + (16 + offset) / group_size
    linears = sum(m.weight.numel() for layer in model.model.layers for m in layer.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in model.parameters())
    return {"block_bits": inside, "file_bits": (linears * inside + (total - linears) * 16) / total}


def llama_cpp(options: Options) -> dict[str, Any]:
    """K-quants by llama.cpp's own quantizer, without data: `options.llama_cpp CHECKPOINT WORK TYPE` writes WORK/TYPE.gguf."""
    import gguf

    name, work = LLAMA_CPP[options.bits], Path(options.work) / f"llama.cpp-{Path(options.model).name}"
    subprocess.run([sys.executable, options.llama_cpp, options.model, str(work), name], check=True, stdout=sys.stderr)
    tensors = gguf.GGUFReader(work / f"{name}.gguf").tensors
    linears = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    model = AutoModelForCausalLM.from_pretrained(str(work), gguf_file=f"{name}.gguf", dtype=torch.float32)
    write(model, options)
    return {
        "block_bits": sum(int(t.n_bytes) for t in linears) * 8 / sum(int(t.n_elements) for t in linears),
        "file_bits": sum(int(t.n_bytes) for t in tensors) * 8 / sum(int(t.n_elements) for t in tensors),
    }


def write(model: Any, options: Options) -> None:
    """Save the weights as a plain checkpoint that has the original's config and tokenizer."""
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    known = original.state_dict()
    values = {name: tensor for name, tensor in model.state_dict().items() if name in known}
    missing = known.keys() - values.keys()
    if missing:
        raise SystemExit(f"{options.tool}: its model has no {sorted(missing)[:3]}; expected the names of the original")
    original.load_state_dict({name: tensor.float() for name, tensor in values.items()})
    original.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


TOOLS: dict[str, Callable[[Any, Tensor, Options], Any]] = {
    "llm-compressor": llm_compressor,
    "llm-compressor-awq": llm_compressor_awq,
    "auto-round": auto_round,
    "hqq-package": hqq,
}


def main() -> None:
    """Quantize, write what it stands for, print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tool", "model", "out", "ids"):
        parser.add_argument(name)
    parser.add_argument("bits", type=float)
    parser.add_argument("group_size", type=int)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--llama-cpp")
    parser.add_argument("--work", default=".")
    options = parser.parse_args()
    options.bits = int(options.bits)
    if options.tool == "llama.cpp":
        found = llama_cpp(options)
    else:
        ids = torch.from_numpy(np.load(options.ids).astype(np.int64))
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        found = stored_bits(model, options.bits, options.group_size, options.tool)
        write(TOOLS[options.tool](model, ids, options), options)
    print("\n" + json.dumps({"checkpoint": options.out, **found}, indent=1))


if __name__ == "__main__":
    main()
