"""Imported once by the process that forks the runs of the crash tests, so that each starts in milliseconds."""

import compress.run  # noqa: F401
import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

torch.set_num_threads(1)
