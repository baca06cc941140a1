"""Peak memory against the number of blocks: flat, because a run holds one block, its statistics and the hidden states.

    python bench/memory.py [--blocks 4 8 16 32] [--hidden 1024] [--folder /tmp/bench-memory]

Writes random Llama checkpoints of one width (bfloat16, 4 query heads per KV head, MLP 2.75 times the width), compresses each with
round-to-nearest and GPTQ (4 bits, group 128, 16 windows of 256 random tokens) in a process of its own, and prints the peak
resident memory of that process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from compress.checkpoint import tensor_file as container
from compress.system.files import human_bytes, write_json

VOCABULARY = 1024


def write_checkpoint(folder: Path, blocks: int, hidden: int) -> Path:
    """Write a random Llama, a file per block, so that this script needs little memory itself."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    wide = hidden * 11 // 4
    generator = torch.Generator().manual_seed(blocks)
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    weight_map: dict[str, str] = {}

    def save(file: str, wanted: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for name, shape in wanted.items():
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            tensors[name] = value.bfloat16()
            weight_map[name] = file
        container.save(folder / file, tensors)

    for block in range(blocks):
        save(f"block-{block:03d}.safetensors", {f"model.layers.{block}.{name}.weight": shape for name, shape in shapes.items()})
    outer = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    save("outer.safetensors", outer)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    return folder


def peak(model: Path, out: Path, method: str, data: Path) -> tuple[int, float]:
    """Compress in a process of its own; return its peak resident bytes and the seconds it took."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".job"), ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "compress",
        "quantize",
        str(model),
        "-o",
        str(out),
        "--method",
        method,
        "--data",
        str(data),
        "--json",
    ]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["peak_memory"], found["seconds"]


def main() -> None:
    """Print the table and check that it is flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-memory"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data = arguments.folder / "ids.npy"
    np.save(data, np.random.default_rng(0).integers(0, VOCABULARY, (16, 256), dtype=np.int32))
    print(f"{'blocks':>6} {'model':>10} {'method':>6} {'peak memory':>12} {'seconds':>8}")
    flat = True
    for method in ("rtn", "gptq"):
        peaks = []
        for blocks in arguments.blocks:
            model = write_checkpoint(arguments.folder / f"llama-{arguments.hidden}-{blocks}", blocks, arguments.hidden)
            size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
            memory, seconds = peak(model, arguments.folder / "out", method, data)
            peaks.append(memory)
            print(f"{blocks:>6} {human_bytes(size):>10} {method:>6} {human_bytes(memory):>12} {seconds:>8.1f}", flush=True)
        spread = max(peaks) / min(peaks) - 1
        flat = flat and spread <= 0.1
        print(f"{method}: the largest peak is {spread:.1%} above the smallest")
    raise SystemExit(0 if flat else 1)


if __name__ == "__main__":
    main()
