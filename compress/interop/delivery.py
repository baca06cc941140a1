"""Who a checkpoint is for: a runtime that has to load it, and layouts that it is exported to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CompressError, FormatError, RecipeError
from compress.interop import exporter, targets
from compress.interop.targets import Finding, Stored
from compress.system.progress import Progress


@dataclass(frozen=True)
class Delivery:
    """A runtime, the number of GPUs that share each weight there, and layouts of other tools, each a folder next to the result.

    Raises RecipeError for names that are not known.
    """

    target: str | None = None
    tensor_parallel: int = 1
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target is not None:
            targets.find_target(self.target)
        elif self.tensor_parallel != 1:
            raise RecipeError("--tensor-parallel: says nothing without --target; add --target vllm, or leave it out")
        for name in self.formats:
            exporter.lookup(name)
        object.__setattr__(self, "formats", tuple(dict.fromkeys(self.formats)))

    @property
    def uniform_siblings(self) -> bool:
        """Whether q, k, v, and gate, up, have to be the same: these runtimes load them as one matrix."""
        return self.target in ("vllm", "sglang")

    def places(self, output: Path) -> dict[str, Path]:
        """Where each export goes: next to the checkpoint."""
        return {name: output.with_name(f"{output.name}-{name}") for name in self.formats}

    def check(self, source: Source, stored: Stored, output: Path) -> list[Finding]:
        """Lint what will be stored of a model, before anything is computed; return the warnings.

        Raises RecipeError, OutputError, FormatError.
        """
        misfits = []
        for name, place in self.places(output).items():
            misfits += targets.misfits(stored, name)
            exporter.check_place(place)
        targets.raise_refused(f"--format {' '.join(self.formats)}", misfits)
        for name in self.formats:
            exporter.check_model(source, stored.family, name, stored.specs)
        return self.lint(stored)

    def lint(self, stored: Stored) -> list[Finding]:
        """Return what the runtime may not like, nothing without one. Raises RecipeError with what it refuses."""
        if self.target is None:
            return []
        found = targets.lint(self.target, stored, self.tensor_parallel, self.formats)
        targets.raise_refused(f"--target {self.target}", found)
        return found


@dataclass(frozen=True)
class Exports:
    """Exports of one checkpoint, and what the runtime may not like of it."""

    source: PackedSource | None
    places: Mapping[str, Path]
    findings: Sequence[Finding]

    @classmethod
    def of(cls, model: str, delivery: Delivery, places: Mapping[str, Path]) -> Exports:
        """Open a compressed checkpoint that goes to `places` by layout, and lint it. Raises CheckpointError, RecipeError."""
        source = exporter.open_packed(model) if places else None
        return cls(
            source,
            places,
            delivery.lint(targets.of_checkpoint(source)) if source is not None and delivery.target is not None else (),
        )

    def write(self, progress: Progress) -> list[dict[str, Any]]:
        """Write them, all checked before the first is written; return what each is, as JSON values. Raises CompressError."""
        if self.source is None:
            return []
        works = [(exporter.prepare(self.source, name), place) for name, place in self.places.items()]
        return [{"output": str(place), **exporter.export(work, place, progress)} for work, place in works]


@dataclass(frozen=True)
class Exported:
    """What came of the exports at the end of a run: those that were written, and why others were not."""

    made: Sequence[dict[str, Any]] = ()
    findings: Sequence[Finding] = ()
    failed: Sequence[CompressError] = ()

    def raise_failed(self) -> None:
        """Raise what failed, once all else is done and shown."""
        if len(self.failed) > 1:
            raise FormatError("\n".join(error.message for error in self.failed))
        if self.failed:
            raise self.failed[0]


def after_run(model: str, delivery: Delivery, places: Mapping[str, Path], progress: Progress) -> Exported:
    """Export the result of a run to `places` by layout; one that fails keeps no other from being written.

    Raises CheckpointError.
    """
    if not places:
        return Exported()
    source = exporter.open_packed(model)
    made: list[dict[str, Any]] = []
    failed: list[CompressError] = []
    findings: Sequence[Finding] = ()
    try:
        findings = delivery.lint(targets.of_checkpoint(source)) if delivery.target is not None else ()
    except CompressError as error:
        failed.append(error)
    for name, place in places.items():
        try:
            made.append({"output": str(place), **exporter.export(exporter.prepare(source, name), place, progress)})
        except CompressError as error:
            failed.append(error)
    return Exported(made, findings, failed)
