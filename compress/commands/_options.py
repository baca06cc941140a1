"""Options that commands of the command line share, one by one and in groups. Nothing heavy is imported here.

A command takes a group as one parameter; `spread` shows typer the options in it, in the group's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.recipe.data_options import DataOptions

if TYPE_CHECKING:
    from compress.planning.budget import Budget
    from compress.runs.prepared import RunOptions

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a Hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")]
DataName = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Calibration: .txt .jsonl .parquet .npy, builtin, self (the model writes it), a preset (c4, ...) or a Hub id.",
    ),
]
Samples = Annotated[int | None, typer.Option(help="Windows of text.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window.")]
Seed = Annotated[int | None, typer.Option(help="Draws documents and windows.")]
ChatTemplate = Annotated[
    bool | None, typer.Option("--chat-template/--no-chat-template", help="Write messages with the tokenizer's template.")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Begin every window with the bos token; else as the tokenizer begins a text."),
]
GroupSize = Annotated[
    str | None,
    typer.Option(help="Input columns that share a scale; -1: the row; auto: 128, or 64 or 32 where it does not divide them."),
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


@dataclass(frozen=True)
class TextFlags:
    """A text, and how much of it is drawn."""

    data: DataName = None
    samples: Samples = None
    length: Length = None
    seed: Seed = None

    def options(self) -> DataOptions:
        """The same for the Python API."""
        return DataOptions(self.data, self.samples, self.length, self.seed)


@dataclass(frozen=True)
class DataFlags(TextFlags):
    """A text, how much of it is drawn, how messages are written, and how windows begin."""

    chat_template: ChatTemplate = None
    bos: Bos = None

    def options(self) -> DataOptions:
        """The same for the Python API."""
        return DataOptions(self.data, self.samples, self.length, self.seed, self.chat_template, self.bos)


@dataclass(frozen=True)
class BudgetFlags:
    """What a plan may spend."""

    bpw: Bpw = None
    size: Size = None
    max_kl: MaxKl = None

    @property
    def given(self) -> bool:
        """Whether there is a budget."""
        return any(value is not None for value in (self.bpw, self.size, self.max_kl))

    def budget(self) -> Budget:
        """The same for the Python API. Raises RecipeError."""
        from compress.planning.budget import Budget

        return Budget.of(self.bpw, self.size, self.max_kl)


@dataclass(frozen=True)
class DeliveryFlags:
    """Who the result is for."""

    format_: Formats = None
    target: Target = None
    tensor_parallel: TensorParallel = 1


@dataclass(frozen=True)
class RunFlags:
    """What changes a recipe for once, how it is run, and what is said of it."""

    settings: Settings = None
    watch: Watch = None
    cache: CacheFolder = None
    dry_run: DryRun = False
    json_: Json = False
    device: Device = "auto"
    dtype: Dtype = None
    offload: Offload = False
    memory: Memory = "4GB"
    job: JobFolder = None
    keep_job: KeepJob = False
    no_reload: NoReload = False
    revision: Revision = None
    evaluate: Evaluate = None

    def options(self, delivery: DeliveryFlags | None = None) -> RunOptions:
        """How the run is done, for the Python API. Raises RecipeError for names of a target or a format that are not known."""
        from compress.runs.prepared import RunOptions

        given = delivery or DeliveryFlags()
        options = RunOptions(
            device=self.device,
            revision=self.revision,
            memory=self.memory,
            offload=self.offload,
            job=self.job,
            keep_job=self.keep_job,
            reload=not self.no_reload,
            cache=self.cache,
            evaluate=self.evaluate,
            target=given.target,
            tensor_parallel=given.tensor_parallel,
            formats=tuple(given.format_ or ()),
        )
        options.delivery()
        return options


@dataclass(frozen=True)
class PlanningFlags:
    """Where and how a model is looked at to plan, and what is said of it."""

    json_: Json = False
    device: Device = "auto"
    dtype: Dtype = None
    memory: Memory = "4GB"
    revision: Revision = None
    quiet: Quiet = False
