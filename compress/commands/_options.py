"""Options that commands of the command line share. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a Hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")]
DataName = Annotated[
    str | None, typer.Option("--data", help="Calibration: .txt .jsonl .parquet .npy, a preset (c4, wikitext2, ...) or a Hub id.")
]
Samples = Annotated[int | None, typer.Option(help="Windows of text.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window.")]
Seed = Annotated[int | None, typer.Option(help="Draws documents and windows.")]
ChatTemplate = Annotated[
    bool | None, typer.Option("--chat-template/--no-chat-template", help="Write messages with the tokenizer's template.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: steps.0.options.bits=3. May be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and its sizes, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="Of the calibration's forward passes: auto, float32, bfloat16, float16.")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep the calibration's hidden states on disk.")]
Memory = Annotated[str, typer.Option(help="Room for statistics; a block that needs more is calibrated in several passes.")]
JobFolder = Annotated[Path | None, typer.Option("--job", help="Where progress is kept; OUTPUT.job if not given.")]
KeepJob = Annotated[bool, typer.Option("--keep-job", help="Do not remove the job folder in the end.")]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="Folder where statistics are kept for other recipes, which skip what they find.")
]
Watch = Annotated[
    int | None,
    typer.Option(
        help="Windows kept from the calibration that are followed while it runs; stops when the model has broken. 0: none."
    ),
]
NoReload = Annotated[
    bool, typer.Option("--no-reload", help="Do not load the result with transformers in a fresh process in the end.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Evaluate = Annotated[
    str | None,
    typer.Option("--evaluate", help="Then measure quality on this text or dataset, for the report and the model card."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Budget: bits per compressed weight, every stored bit counted.")]
Size = Annotated[str | None, typer.Option("--size", help="Budget: tensor bytes of the whole checkpoint, as 4GB or 500MiB.")]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", help="Budget: KL divergence to the original in nats; the smallest model within it.")
]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", help="Export to compressed-tensors, gptq, awq, gguf or dense. May be repeated: a folder each."),
]
Target = Annotated[
    str | None, typer.Option("--target", help="Check that vllm, sglang, transformers or llama.cpp will load it, before any work.")
]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel", min=1, help="GPUs that share each weight on the target.")]
