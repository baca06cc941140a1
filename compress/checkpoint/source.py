"""A Hugging Face checkpoint on disk or on the Hub: its config, its tensors by name, and the side files to copy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.fp8_mxfp4 import decoded
from compress.checkpoint.tensor_file import DTYPES, Entry, described, read_header, read_tensor
from compress.errors import CheckpointError
from compress.system.side_files import lies_within, read_object
from compress.weights.site_input import SiteInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIZES_KEY = "compress_sizes"  # in config.json: [out, in] of linears that are smaller than its other entries say
_ADAPTER = "adapter_config.json"
# What frameworks put before the names of a model that they hold, and who does.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "data-parallel training",
    "base_model.model.": "an adapter of PEFT",
    "_fsdp_wrapped_module.": "sharded training",
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.py",
    "*.md",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)
# Files of a model that are copied byte for byte; weights, indexes, configs and cards are written from scratch.
_CARRIED = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.py",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
    "additional_chat_templates/*",
)
_REWRITTEN = ("config.json", "*.index.json", "README.md", "summary.json", "evaluation.json", "report.*", ".*")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: headers are read and checked, weights are not."""

    folder: Path
    name: str  # as the user wrote it: a folder or a Hub id
    config: dict[str, Any]
    entries: dict[str, Entry]
    revision: str | None = None
    remote: bool = False  # only headers were read; weights are on the Hub
    coded: str | None = None  # stored type of weights that are decoded to bfloat16 when read
    as_read: str = ""  # SHA-256 of the values of config.json

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None) -> Source:
        """Open a folder, or fetch a Hub id into the local cache. Raises CheckpointError."""
        # The methods of Path would raise for an unknown ~name, a name that is too long, and a folder that may not be read.
        folder = Path(os.path.expanduser(model))
        found = None
        if not os.path.isdir(folder):
            folder, found = _fetch(str(model), revision)
        config = _read_config(folder)
        as_read = _digest(config)
        entries = _entries(folder)
        _check_names(folder, entries)
        _check_config(folder / "config.json", config, entries)
        config, entries, coded = decoded(config, entries)
        return cls(folder.resolve(), str(model), config, entries, found, coded=coded, as_read=as_read)

    @classmethod
    def headers(cls, model: str | Path, revision: str | None = None) -> Source:
        """Open a folder, or read only config and headers of a Hub id, by byte ranges. Raises CheckpointError."""
        if os.path.isdir(os.path.expanduser(model)):
            return cls.open(model, revision)
        folder, entries = _fetch_headers(str(model), revision)
        config = _read_config(folder)
        _check_config(folder / "config.json", config, entries)
        config, entries, coded = decoded(config, entries)
        return cls(folder, str(model), config, entries, folder.name, remote=True, coded=coded)

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config.get("model_type", ""))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors as stored in files."""
        return sum(entry.stored for entry in self.entries.values())

    @property
    def numel(self) -> int:
        """Number of values in all tensors."""
        return sum(entry.numel for entry in self.entries.values())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return DTYPES[self.entries[name].dtype]

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor, or element `index` of its first axis; a value that is not finite raises CheckpointError."""
        if name not in self.entries:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}; the checkpoint is incomplete, fetch it again")
        tensor = read_tensor(self.entries[name], index)
        if tensor.is_floating_point():
            check_finite(tensor, f"{self.entries[name].file}: {name}")
        return tensor

    def rounded_input(self, name: str) -> SiteInput | None:
        """What rounds the input of the weight of this name; nothing does in a plain checkpoint."""
        return None

    def carried(self) -> list[Path]:
        """Side files to copy byte for byte: tokenizer, chat templates, generation config, licence. Raises CheckpointError."""
        rewritten = {path for pattern in _REWRITTEN for path in self.folder.glob(pattern)}
        found = sorted({p for pattern in _CARRIED for p in self.folder.glob(pattern) if p.is_file()} - rewritten)
        if outside := [path for path in found if not lies_within(path, self.folder)]:
            raise CheckpointError(
                f"{outside[0]}: is a link to {os.path.realpath(outside[0])}, outside of the model, and would be copied into the "
                "result; put a copy in its place if it belongs to the model, or remove it"
            )
        return found

    def placed(self) -> Iterable[Entry]:
        """The tensors as stored in files."""
        return self.entries.values()

    def check_unchanged(self) -> None:
        """Raise CheckpointError where files are not what they were when the source was opened, before a result gets its name."""
        files = {entry.file: entry.seen for entry in self.placed() if entry.seen is not None}
        different = [file for file, seen in files.items() if not file.exists() or _now(file) != seen]
        if self.as_read and _digest(_read_config(self.folder)) != self.as_read:
            different.append(self.folder / "config.json")
        if different:
            raise CheckpointError(
                f"{different[0]}: was changed during the run; the result is not published. Start again when the model is whole"
            )

    def fingerprint(self) -> dict[str, str]:
        """Identify the files: a hash of the config; size, modification time and header hash of each weight file."""
        result = {"config": _digest(self.config)}
        for file in sorted({entry.file for entry in self.placed()}):
            mine = sorted((e.name, e.dtype, e.shape, e.start) for e in self.placed() if e.file == file)
            header = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
            size, changed = next(e.seen for e in self.placed() if e.file == file) or _now(file)
            result[file.name] = f"{size} bytes, changed {changed}, header {header}"
        return result


def _digest(config: dict[str, Any]) -> str:
    """SHA-256 of the values of a config, in whatever order they stand."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _now(file: Path) -> tuple[int, int]:
    """Size of a file and the time of its last change, as entries have seen them."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def check_finite(tensor: Tensor, place: str) -> None:
    """Raise CheckpointError when a tensor holds a value that is not finite."""
    values = tensor if tensor.itemsize > 1 else tensor.to(torch.bfloat16)
    # NaN and infinities survive a sum, which costs one pass and no memory; an overflow only costs a second check.
    if not bool(values.sum(dtype=torch.float32).isfinite()) and not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).sum())
        raise CheckpointError(
            f"{place}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite weights. Fetch the file again"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not os.path.lexists(path) and (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder}: holds an adapter ({_ADAPTER}), not a model; merge it into its base model first, as "
            "PeftModel.merge_and_unload does, and save that with save_pretrained"
        )
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: not found; a Hugging Face checkpoint has one; is this the folder of a model?")
    return read_object(path)


def _check_names(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Raise CheckpointError where all names begin as those of a model within another do, which transformers would not know."""
    for prefix, made in _WRAPPERS.items():
        if all(name.startswith(prefix) for name in entries):
            raise CheckpointError(
                f"{folder}: every tensor's name begins with {prefix!r}, as {made} leaves it; load the weights without it, "
                "and save the model within it with save_pretrained"
            )


def _check_config(path: Path, config: dict[str, Any], entries: dict[str, Entry]) -> None:
    """Check the entries of a config that decide how much is built before a tensor is read. Raises CheckpointError."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]  # multimodal: text_config
    for key, count in ((key, part.get(key)) for part in parts for key in ("num_hidden_layers", "n_layer")):
        # transformers would build them all.
        if isinstance(count, int) and (isinstance(count, bool) or count > len(entries)):
            raise CheckpointError(
                f"{path}: {key} is {count!r:.80}; expected a number of blocks. There are {len(entries)} tensors: fetch it again"
            )
    if SIZES_KEY in config and (config.get("quantization_config") or {}).get("sites") == {}:
        # Nothing is compressed: the entry only makes transformers call compress for the sizes.
        del config["quantization_config"]
        config.pop("transformers_weights", None)
    if config.get("quantization_config") is None:
        config.pop("quantization_config", None)  # some tools write null for none
    elif not isinstance(config["quantization_config"], dict):
        raise CheckpointError(
            f"{path}: quantization_config is {config['quantization_config']!r:.80}; expected an object. Fetch the file again"
        )


@contextmanager
def _asking(model: str) -> Iterator[None]:
    """Turn errors of the Hub's client about a model into a CheckpointError."""
    from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError

    advice = "give the folder of a checkpoint, or a Hub id such as org/name that can be reached from here"
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such folder; {advice}")
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"{model}: neither a folder nor a Hub id; {advice}") from error
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"{model}: {str(error).splitlines()[0]}; expected a checkpoint in safetensors") from error
    except OSError as error:  # every failure of the Hub client: offline, not found, gated
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model}: no such folder, and the Hub does not give it ({reason}); {advice}") from error


def _fetch(model: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    with _asking(model):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(_HUB_FILES)))
    return folder, folder.name


def _fetch_headers(model: str, revision: str | None) -> tuple[Path, dict[str, Entry]]:
    """Return the cache folder with the config, and the tensors of all files."""
    from huggingface_hub import HfApi, hf_hub_download

    with _asking(model):
        folder = Path(hf_hub_download(model, "config.json", revision=revision)).parent
        found = HfApi().get_safetensors_metadata(model, revision=revision)
    entries: dict[str, Entry] = {}
    for file, metadata in sorted(found.files_metadata.items()):
        header = {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
            for name, tensor in metadata.tensors.items()
        }
        entries |= described(folder / file, header)
    return folder, entries


def _index(folder: Path) -> dict[str, str]:
    """Read the index: file name by tensor name. Only files within the folder are accepted."""
    path = folder / INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map; expected file names by tensor name. Fetch the file again")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and len(file.encode()) <= 255  # limit of file systems
        if not plain or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {name[:80]!r} lies in {file!r:.80}; expected the name of a .safetensors file in the same folder. "
                "Do not use a checkpoint that points elsewhere"
            )
    return weight_map


def _entries(folder: Path) -> dict[str, Entry]:
    if (folder / SINGLE).exists():
        return _named(folder / SINGLE)
    if not (folder / INDEX).exists():
        if pickles := sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern)):
            raise CheckpointError(
                f"{folder}: holds {pickles[0]}, a pickle, which can run code when it is opened; expected safetensors. "
                "Convert it: load it with transformers where you trust it, and save_pretrained it"
            )
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; expected a Hugging Face checkpoint in safetensors")
    weight_map = _index(folder)
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            raise CheckpointError(f"{folder / file}: not found, but {INDEX} names it; fetch the checkpoint again")
        for name, entry in _named(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{folder / file}: holds {name!r}, which {INDEX} does not place there; fetch the checkpoint again"
                )
            entries[name] = entry
    if missing := sorted(set(weight_map) - set(entries)):
        raise CheckpointError(
            f"{folder}: {INDEX} names {len(missing)} tensors that no file holds, such as {missing[0]!r:.80}; fetch it again"
        )
    return entries


def _named(path: Path) -> dict[str, Entry]:
    entries, _ = read_header(path)
    if not entries:
        raise CheckpointError(f"{path}: holds no tensors; fetch the file again")
    return entries
