"""Imported once by the process that forks the runs of the crash tests, so that each starts in milliseconds.

One run in this process loads all that transformers and torch load when they are first used.
"""

import tempfile
from pathlib import Path

import torch
from charts import leave_out
from runs import compress, ids_file, steps
from tiny import tiny_checkpoint

torch.set_num_threads(1)
leave_out()
with tempfile.TemporaryDirectory() as folder:
    for family in ("llama", "mixtral"):
        model = tiny_checkpoint(Path(folder) / family, family, num_hidden_layers=1)
        compress(model, Path(folder) / f"{family}-out", ids_file(Path(folder) / "ids.npy"), steps(bits=3, group_size=16))
