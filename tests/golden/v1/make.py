"""How this checkpoint was made, once, with format version 1: `PYTHONPATH=tests/support python tests/golden/v1/make.py`.

A tiny Mixtral with every width from 1 to 8 bits, symmetric and asymmetric grids, and columns in groups that are not neighbours.
It is never made again: tests/checkpoint/test_packed_source.py reads it, and so must every later version. A new version gets
its own folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from runs import compress, ids_file
from tiny import tiny_checkpoint

from compress.checkpoint.packed_source import PackedSource

HERE = Path(__file__).parent
PROBE = [[3, 1, 4, 1, 5, 9, 2, 6], [31, 0, 27, 18, 28, 18, 2, 8]]


def step(match: str, method: str, **options: object) -> dict[str, object]:
    return {"match": f"*.{match}", "method": f"quant/{method}", "options": options, "min_tokens": 0}


STEPS = [
    step("q_proj", "gptq", bits=3, group_size=8, order="desc_act"),
    step("k_proj", "gptq", bits=4, group_size=16, symmetric=False, order="desc_act"),
    step("v_proj", "rtn", bits=8, group_size=8, symmetric=False),
    step("o_proj", "rtn", bits=1, group_size=32),
    step("experts.0.w1", "rtn", bits=2, group_size=16, symmetric=False),
    step("experts.0.*", "gptq", bits=5, group_size=-1),
    step("experts.1.w2", "rtn", bits=7, group_size=4),
    step("experts.1.*", "gptq", bits=6, group_size=16, symmetric=False),
]


def main() -> None:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
        model = tiny_checkpoint(folder / "model", "mixtral", **shape)
        compress(model, folder / "out", ids_file(folder / "ids.npy", vocabulary=32), STEPS)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(folder / "out" / file, HERE / file)
    source = PackedSource.open_packed(HERE)
    digests = {n: hashlib.sha256(source.tensor(n).numpy().tobytes()).hexdigest() for n in sorted(source.entries)}
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)(torch.tensor(PROBE)).logits
    rounded = [[[round(value, 4) for value in token] for token in row] for row in logits.tolist()]
    values = {"probe": PROBE, "logits": rounded, "sha256": digests}
    (HERE / "expected.json").write_text(
        json.dumps(values, separators=(",", ":")).replace('"sha256":{', '\n"sha256":{\n').replace('","', '",\n"') + "\n"
    )


if __name__ == "__main__":
    main()
