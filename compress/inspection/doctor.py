"""What is wrong with a checkpoint of any kind: all that is found, each in a sentence that says what to do.

Opening a checkpoint stops at the first problem. This goes on, from files to tensors, the model, values and runtimes, as far as
what was found allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from compress.architecture.config import vocabulary
from compress.architecture.inventory import Inventory, take_inventory
from compress.architecture.names import matches, parameter_name
from compress.checkpoint import packing, site_table
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.recorded_files import recorded_files, sha256_of
from compress.checkpoint.source import INDEX, SINGLE, Source
from compress.checkpoint.tensor_file import Entry, read_header, read_tensor
from compress.errors import CheckpointError, CompressError, FamilyError
from compress.interop import gguf_file, targets
from compress.interop.foreign import ForeignSource, importer, open_any
from compress.model.complete import unfilled
from compress.model.detect import find_family
from compress.model.streamed import StreamedModel
from compress.system.progress import Progress
from compress.system.side_files import read_json, read_object

Severity = Literal["error", "warning", "note"]
_STAGES = ("files", "checksums", "tensors", "model", "values", "tokenizer", "runtimes")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """One thing that was found."""

    severity: Severity
    stage: str
    message: str  # place, what is there, what is expected, what to do


@dataclass
class Diagnosis:
    """All that was found, and what the checkpoint is."""

    folder: str
    kind: str = "not a checkpoint"  # dense, native, or the layout of another tool
    problems: list[Problem] = field(default_factory=list)
    runtimes: dict[str, str] = field(default_factory=dict)  # what each would say

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; warnings and notes are no errors."""
        return not any(problem.severity == "error" for problem in self.problems)

    def plain(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        return {"healthy": self.healthy, **asdict(self)}

    def add(self, severity: Severity, stage: str, message: str) -> None:
        """Note something."""
        self.problems.append(Problem(severity, stage, message))


def diagnose(folder: Path, target: str | None, parallel: int, progress: Progress, registered: bool = True) -> Diagnosis:
    """Examine a folder; nothing in it can make this fail. `target` makes what that runtime refuses an error, and not `registered`
    what a program meets that does not import this package.
    """
    found = Diagnosis(str(folder))
    if target is not None:
        targets.find_target(target)
    progress(0, len(_STAGES), "files", 0.0)
    if not folder.is_dir():
        found.add("error", "files", f"{folder}: no such folder; give the folder of a checkpoint")
        return found
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        found.kind = "gguf"
        _checksums(folder, found)
        for path in files:
            progress(4, len(_STAGES), "values", 0.0)
            for message in gguf_file.examine(path):
                found.add("error", "tensors", f"{path.name}: {message}")
        return found
    config = _config(folder, found)
    _files(folder, found)
    progress(1, len(_STAGES), "checksums", 0.0)
    _checksums(folder, found)
    progress(2, len(_STAGES), "tensors", 0.0)
    source = None
    try:
        source = open_any(str(folder))
    except CheckpointError as error:
        if not any(problem.severity == "error" and problem.stage == "files" for problem in found.problems):
            found.add("error", "tensors", str(error))  # of files, everything is said already
    _kind(found, config, source, registered)
    if source is None:
        return found
    _config_and_weights(source, found)
    progress(3, len(_STAGES), "model", 0.0)
    _model(source, found)
    _values(source, found, lambda share: progress(4, len(_STAGES), "values", share))
    progress(5, len(_STAGES), "tokenizer", 0.0)
    _tokenizer(source, found)
    progress(6, len(_STAGES), "runtimes", 0.0)
    _runtimes(source, found, target, parallel)
    return found


def _json(path: Path, stage: str, found: Diagnosis) -> Any:
    try:
        return read_json(path)
    except CheckpointError as error:
        found.add("error", stage, error.message.replace(str(path), path.name, 1))
        return None


def _config(folder: Path, found: Diagnosis) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        what = "no config.json, which is written last: what wrote this folder did not finish, or files were left out"
        found.add("error", "files", f"{folder}: {what}. Write or fetch it again")
        return {}
    config = _json(path, "files", found)
    if not isinstance(config, dict):
        if config is not None:
            found.add("error", "files", f"config.json: holds a JSON {type(config).__name__}; expected an object. Fetch it again")
        return {}
    if not config.get("model_type"):
        found.add("error", "files", "config.json: no model_type, by which loaders choose the model; fetch the file again")
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        if (folder / name).exists():
            _json(folder / name, "files", found)
    return config


def _files(folder: Path, found: Diagnosis) -> None:
    """Every weight file, whether the others are sound or not."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    placed: dict[str, str] = {}
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        found.add("warning", "files", f"{INDEX}: lies beside {SINGLE}, which loaders take alone; remove the one that is stale")
    elif (folder / INDEX).exists():
        index = _json(folder / INDEX, "files", found)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            if index is not None:
                found.add("error", "files", f"{INDEX}: no weight_map; expected file names by tensor name. Fetch the file again")
            weight_map = {}
        placed = weight_map
        for name in sorted(set(placed.values()) - set(files)):
            count = sum(file == name for file in placed.values())
            found.add("error", "files", f"{name}: not there, but {INDEX} places {count} tensors in it; fetch that file")
        for name in sorted(set(files) - set(placed.values())) if placed else []:
            what = f"is not in {INDEX}; loaders that read every file would take stale weights"
            found.add("warning", "files", f"{name}: {what}. Remove it, or fetch the index again")
    if not files:
        others = sorted(p.name for pattern in ("*.gguf", "*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        held = f"only {', '.join(others[:_SHOWN])}" if others else "no weights"
        found.add("error", "files", f"{folder}: holds {held}; expected safetensors files. Fetch the weights, or convert them")
    for name in files:
        try:
            entries, _ = read_header(folder / name)
        except CheckpointError as error:
            found.add("error", "files", str(error))
            continue
        if not entries:
            found.add("error", "files", f"{name}: holds no tensors; fetch the file again")
        strays = [tensor for tensor in entries if placed and placed.get(tensor) != name]
        if strays and name in placed.values():
            what = f"holds {len(strays)} tensors that {INDEX} does not place there, such as {strays[0]}"
            found.add("error", "files", f"{name}: {what}; files were swapped or renamed, or are of another checkpoint")
        lost = [tensor for tensor, file in placed.items() if file == name and tensor not in entries]
        if lost:
            what = f"lacks {len(lost)} tensors that {INDEX} places there, such as {lost[0]}"
            found.add("error", "files", f"{name}: {what}; files were swapped or renamed, or are of another checkpoint")


def _checksums(folder: Path, found: Diagnosis) -> None:
    """What compress wrote has the SHA-256 of its weight files with it."""
    for record in ("summary.json", "export.json"):
        if not (folder / record).exists():
            continue
        try:
            files = recorded_files(read_object(folder / record).get("files"))
            now = {name: sha256_of(folder, name) for name in files}
        except (CheckpointError, ValueError) as error:
            found.add("error", "checksums", f"{record}: {error}; fetch it again")
            continue
        digests = {digest: name for name, digest in files.items()}
        for name, digest in files.items():
            if (got := now[name]) is None:
                found.add("error", "checksums", f"{name}: not there, but {record} has its SHA-256; fetch that file")
            elif got != digest:
                swapped = f"; it is what {digests[got]} should be: files were swapped" if got in digests else ""
                what = f"SHA-256 is {got[:12]}..., recorded is {str(digest)[:12]}...{swapped}"
                found.add("error", "checksums", f"{name}: {what}. The file changed since it was written: fetch it again")


def _kind(found: Diagnosis, config: dict[str, Any], source: Source | None, registered: bool) -> None:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(source, ForeignSource):
        found.kind = source.form.name
    elif method == packing.METHOD:
        found.kind = "native"
        what = "quant_method is compress, which transformers knows only after `import compress`"
        advice = "put that line before from_pretrained (pip install compress-llm); without it loading fails, so that no random"
        advice += " weights are used"
        found.add("note" if registered else "error", "model", f"config.json: {what}; {advice}")
        if config.get(site_table.FILE_KEY) not in site_table.ABSENT_FILES:
            guarded = quantization is not None and quantization.get("guard") is not None
            left = "only an empty tensor stops programs" if guarded else "nothing stops programs"
            what = f"no {site_table.FILE_KEY}, so {left} without `import compress` from taking random weights"
            advice = (
                f'add "{site_table.FILE_KEY}": "{site_table.IMPORT_FIRST}", or write it again: `compress convert --to native`'
            )
            found.add("warning" if guarded else "error", "model", f"config.json: {what}; {advice}")
    elif source is not None and source.coded is not None:
        found.kind = source.coded
        found.add("note", "tensors", f"weights are in {source.coded}; compress decodes them to bfloat16 as it reads them")
    elif method is not None:
        found.kind = str(method)
        if importer({"quant_method": method}) is None:
            what = f"quant_method is {method!r}, whose tensors compress does not read; only files were examined closely"
            found.add("warning", "tensors", f"config.json: {what}. Load it with the package of that method")
    elif source is not None:
        found.kind = "dense"


def _config_and_weights(source: Source, found: Diagnosis) -> None:
    """A config that says compressed of dense weights, or dense of compressed ones."""
    leaves = {name.rpartition(".")[2] for name in source.entries}
    if isinstance(source, PackedSource):
        return
    packed_leaves = {"codes": "compress", "qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors"}
    for leaf, tool in packed_leaves.items():
        names = [name for name in source.entries if name.endswith(f".{leaf}")]
        if leaf in leaves and "quantization_config" not in source.config:
            what = f"{len(names)} tensors such as {names[0]} are packed by {tool}, but config.json has no quantization_config"
            found.add("error", "tensors", f"{what}; fetch the config.json that belongs to these weights")
    if "quantization_config" in source.config and not leaves & {*packed_leaves, "weight_scale", "scales", "scale", "absmax"}:
        what = "quantization_config is there, but no tensor is packed: it is left over from another checkpoint"
        found.add("error", "tensors", f"config.json: {what}. Take quantization_config out, or fetch the packed weights")


def _model(source: Source, found: Diagnosis) -> None:
    """Build the model of the config on meta and compare its parameters with the tensors."""
    bare = source
    if not isinstance(source, PackedSource) and "quantization_config" in source.config:
        if any(problem.stage == "tensors" and "left over" in problem.message for problem in found.problems):
            config = {key: value for key, value in source.config.items() if key != "quantization_config"}
            bare = Source(source.folder, source.name, config, source.entries, source.revision)
        else:
            return
    try:
        inventory = take_inventory(bare, find_family(bare))
    except FamilyError as error:
        found.add("note", "model", str(error))
        return
    except CheckpointError as error:
        found.add("error", "model", str(error))
        return
    try:
        streamed = StreamedModel(bare, inventory, torch.float32, torch.device("cpu"))
    except (CheckpointError, AttributeError, KeyError) as error:
        found.add("error", "model", f"{error}; config.json may be that of another model than the weights: fetch both again")
        return
    wrong = list(_wrong_shapes(bare, inventory, streamed))
    if wrong:
        name, got, expected = wrong[0]
        what = f"{name} has shape {got}, but config.json makes a model with {expected}"
        more = f" ({len(wrong)} tensors have other shapes)" if len(wrong) > 1 else ""
        advice = "config.json of one model with weights of another? Fetch both from one place"
        found.add("error", "model", f"{source.folder}: {what}{more}; {advice}")
    if extra := _extra(inventory, streamed):
        what = f"{len(extra)} tensors have no place in the model of config.json, such as {', '.join(extra[:_SHOWN])}"
        advice = "they are kept byte for byte and never loaded; prediction heads and towers are such, others should not be there"
        found.add("note", "model", f"{source.folder}: {what}; {advice}")
    missing = unfilled(streamed)
    if missing:
        what = f"{len(missing)} parameters of the model have no tensor, such as {', '.join(missing[:_SHOWN])}"
        found.add("error", "model", f"{source.folder}: {what}; loaders would fill them at random. Fetch the checkpoint again")


def _wrong_shapes(source: Source, inventory: Inventory, streamed: StreamedModel) -> Iterator[tuple[str, list[int], list[int]]]:
    known = {**dict(streamed.model.named_parameters()), **dict(streamed.model.named_buffers())}
    for site in inventory.sites:
        try:
            module: Any = streamed.linear(site)
        except AttributeError:
            yield site.name, list(site.shape), []
            continue
        expected = list(module.weight.shape)
        if type(module).__name__ == "Conv1D":
            expected.reverse()
        if expected != list(site.shape):
            yield site.name, list(site.shape), expected
    for name in inventory.copied:
        parameter = known.get(parameter_name(inventory.family, name))
        if parameter is not None and list(parameter.shape) != list(source.entries[name].shape):
            yield name, list(source.entries[name].shape), list(parameter.shape)


def _extra(inventory: Inventory, streamed: StreamedModel) -> list[str]:
    """Copied tensors that no parameter or buffer of the model takes."""
    known = {name for name, _ in (*streamed.model.named_parameters(), *streamed.model.named_buffers())}
    aside = inventory.family.aside
    return [n for n in inventory.copied if parameter_name(inventory.family, n) not in known and not matches(n, aside)]


def _values(source: Source, found: Diagnosis, progress: Callable[[float], None]) -> None:
    """Every stored float must be a number."""
    stored = {name: entry for name, entry in source.entries.items() if entry.file.is_file()}
    stored |= source.packed if isinstance(source, PackedSource) else {}
    bad: list[str] = []
    for number, (name, entry) in enumerate(stored.items()):
        if number % 64 == 0:
            progress(number / len(stored))
        if (count := _not_finite(entry)) is not None:
            bad.append(f"{name} ({count} of {entry.numel})")
    if bad:
        what = f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:_SHOWN])}"
        found.add("error", "values", f"{source.folder}: {what}; the model would give NaN. Fetch the files, or compress again")
    if isinstance(source, PackedSource):
        for site in source.table:
            try:
                source.compressed(site)
            except CompressError as error:
                found.add("error", "values", f"{site}: cannot be decoded ({error.message})")
                break


def _not_finite(entry: Entry) -> int | None:
    try:
        tensor = read_tensor(entry)
    except CheckpointError:
        return entry.numel
    if not tensor.is_floating_point():
        return None
    count = int((~(tensor.float() if tensor.itemsize == 1 else tensor).isfinite()).sum())
    return count or None


def _tokenizer(source: Source, found: Diagnosis) -> None:
    if not any(path for pattern in _TOKENIZERS for path in source.folder.glob(pattern)):
        what = "no tokenizer (tokenizer.json, tokenizer.model, ...); pipelines and servers cannot read text without it"
        found.add("warning", "tokenizer", f"{source.folder}: {what}. Copy it from the original model")
        return
    path = source.folder / "tokenizer.json"
    try:
        values = read_object(path)
        ids = [t["id"] for t in values.get("added_tokens", [])] + list((values.get("model") or {}).get("vocab", {}).values())
        largest = max(number for number in ids if isinstance(number, int))
        size = vocabulary(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
        return  # another kind of tokenizer, or said already
    if largest >= size:
        what = f"names token {largest}, but the model has {size}; it belongs to another model"
        found.add("error", "tokenizer", f"tokenizer.json: {what}. Copy it from the original model")


def _runtimes(source: Source, found: Diagnosis, target: str | None, parallel: int) -> None:
    """What each runtime would say to a compressed checkpoint as it is."""
    if not isinstance(source, PackedSource):
        return
    layout = source.form.name if isinstance(source, ForeignSource) else "native"
    try:
        stored = targets.of_checkpoint(source)
    except CheckpointError:
        return  # said already
    for name, runtime in targets.TARGETS.items():
        if layout not in runtime.reads:
            advice = f"`compress export --format {runtime.reads[0]}` writes one that it does"
            message = f"{name} does not read the layout {layout}; {advice}"
            findings = [targets.Finding("refuse", message)]
        else:
            findings = targets.lint(name, stored, parallel, [layout])
        refused = [finding.message for finding in findings if finding.severity == "refuse"]
        found.runtimes[name] = refused[0] if refused else "loads it" + ("" if not findings else f"; {findings[0].message}")
        if name == target:
            for finding in findings:
                found.add("error" if finding.severity == "refuse" else "warning", "runtimes", f"{name}: {finding.message}")
