"""Write a compressed checkpoint as a GGUF file, tensor by tensor, and read it back."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress._version import __version__
from compress.architecture.config import settings
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CheckpointError, FormatError, OutputError, VerificationError
from compress.interop import gguf_blocks as blocks
from compress.interop import llama_cpp as _llama_cpp
from compress.output import seal
from compress.system.side_files import open_regular, read_object

FILE = "model.gguf"
MAX_COUNT = 250_000  # tensors, and keys, of a file
_LEAST = 13  # bytes that describe a tensor or a key
_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q5_0": "MOSTLY_Q5_0", "Q8_0": "MOSTLY_Q8_0", "MXFP4": "MOSTLY_MXFP4_MOE"}


@dataclass
class Member:
    """One tensor of the file: a quantized matrix, a tensor of floats, or the experts of a block in order."""

    name: str
    kind: str  # GGML type
    shape: tuple[int, ...]  # in torch's order
    sources: list[str] = field(default_factory=list)  # sites, or the disk name of a dense tensor
    heads: int = 0  # number of heads whose rows are reordered, or 0
    nbytes: int = 0


def check_model(source: Source) -> list[str]:
    """Return what a reader should know of a model that llama.cpp has a place for. Raises FormatError where it has none."""
    config = settings(source)
    try:
        notes = _llama_cpp.check(config)
        _llama_cpp.parameters(config)
        if not source.remote:  # the tokenizer of a model on the Hub comes with its weights
            vocabulary(source)
    except (FormatError, KeyError) as error:
        reason = f"config.json has no {error}" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{source.folder}: {reason}") from error
    return notes


def plan(source: PackedSource, schemes: Mapping[str, blocks.Blocks]) -> tuple[list[Member], list[str], list[str]]:
    """Return the tensors of the file, tensors that llama.cpp has no place for, and notes. Raises FormatError."""
    config, notes = settings(source), check_model(source)
    members: dict[str, Member] = {}
    left: list[str] = []
    tied = config.get("tie_word_embeddings", False)
    for name in sorted(source.entries, key=seal.natural):
        place = _llama_cpp.place(name, config)
        if place is None or (place.name == "output.weight" and tied):
            left.append(name)
            continue
        site = name.removesuffix(".weight")
        packed = name.endswith(".weight") and site in schemes
        shape = source.entries[name].shape
        kind = schemes[site].kind if packed else _dense_kind(source.entries[name].dtype, shape, place.name)
        member = members.setdefault(place.name, Member(place.name, kind, shape, [], place.heads))
        member.sources.append(site if packed else name)
        if place.expert is not None:
            if place.expert != len(member.sources) - 1:
                raise FormatError(f"{source.folder}: {name} is out of order; expected experts 0, 1, 2, ... of {place.name}")
            both = blocks.widest([member.kind, kind])
            if both is None and member.kind != kind:
                raise FormatError(
                    f"{name}: is {kind}, and experts before it are {member.kind}; llama.cpp stores the experts of a block as "
                    "one tensor of one type. Compress all experts of a block, or none"
                )
            member.kind = both or kind
            member.shape = (len(member.sources), *shape)
    for member in members.values():
        member.nbytes = _nbytes(member)
    return list(members.values()), left, notes


def _dense_kind(dtype: str, shape: tuple[int, ...], name: str) -> str:
    if dtype not in ("F32", "F16", "BF16"):
        raise FormatError(f"{name}: is {dtype}; a gguf file has dense tensors in F32, F16 or BF16. Leave it out, or decode it")
    # llama.cpp computes with norms, biases and routers in F32.
    return "F32" if len(shape) == 1 or "ffn_gate_inp" in name else dtype


def _nbytes(member: Member) -> int:
    count = 1
    for size in member.shape:
        count *= size
    if member.kind in blocks.BYTES:
        return count // blocks.BLOCK * blocks.BYTES[member.kind]
    return count * (4 if member.kind == "F32" else 2)


def vocabulary(source: Source) -> _llama_cpp.Vocabulary:
    """Read the tokenizer of a checkpoint. Raises FormatError."""
    path = source.folder / "tokenizer.json"
    try:
        tokenizer = read_object(path)
    except CheckpointError as error:
        if not path.exists():
            raise FormatError("no tokenizer.json, which llama.cpp needs within the file; put it beside the weights") from None
        raise FormatError(error.message) from error
    return _llama_cpp.vocabulary(tokenizer, settings(source)["vocab_size"])


def library() -> Any:
    """Return the package gguf. Raises OutputError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise OutputError("--format gguf: the package gguf is not installed; pip install 'compress-llm[gguf]'") from None
    return gguf


def write(
    source: PackedSource, schemes: Mapping[str, blocks.Blocks], members: list[Member], path: Path, step: Callable[[str], None]
) -> None:
    """Write the file in the order of `members`, one tensor in memory at a time. Raises FormatError."""
    gguf = library()
    config = settings(source)
    writer = gguf.GGUFWriter(str(path), _llama_cpp.ARCHITECTURES[config["model_type"]])
    try:
        _metadata(writer, gguf, source, members)
        factors = _llama_cpp.rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.nbytes)
        types = gguf.GGMLQuantizationType
        for member in members:
            # GGUF counts the blocks of a row, so the shape passed is that of the bytes.
            row = member.nbytes // max(_rows(member), 1)
            byte_shape = (*member.shape[:-1], row)
            info = (torch.empty(0, dtype=torch.uint8).numpy().dtype, member.nbytes, types[member.kind])
            writer.add_tensor_info(member.name, byte_shape, *info)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for member in members:
            writer.write_tensor_data(_data(source, schemes, member, step).numpy())
    finally:
        writer.close()


def _rows(member: Member) -> int:
    count = 1
    for size in member.shape[:-1]:
        count *= size
    return count


def _data(source: PackedSource, schemes: Mapping[str, blocks.Blocks], member: Member, step: Callable[[str], None]) -> Tensor:
    """The bytes of one tensor, (rows, row bytes) uint8."""
    found = []
    for name in member.sources:
        if name in schemes:
            step(name)
            scheme = schemes[name]
            wanted = blocks.Blocks(scheme.shape, member.kind, scheme.group_size, scheme.bits)
            try:
                rows = blocks.pack(wanted, source.compressed(name))
            except FormatError as error:
                raise FormatError(f"{name}: {error}; gguf holds {blocks.HOLDS}. Export to compressed-tensors") from error
        else:
            tensor = source.tensor(name)
            dense = tensor.float() if member.kind == "F32" else tensor
            rows = dense.contiguous().view(torch.uint8).view(dense.shape[0], -1)
        found.append(_llama_cpp.reorder(rows, member.heads))
    data = found[0] if len(found) == 1 else torch.cat(found)
    return data.flatten() if len(member.shape) == 1 else data


def _metadata(writer: Any, gguf: Any, source: PackedSource, members: list[Member]) -> None:
    config = settings(source)
    arch = _llama_cpp.ARCHITECTURES[config["model_type"]]
    sizes: dict[str, int] = {}
    for member in members:
        if member.kind in blocks.BYTES:
            sizes[member.kind] = sizes.get(member.kind, 0) + member.nbytes
    most = max(sizes, key=lambda kind: sizes[kind])
    writer.add_type("model")
    writer.add_name(source.folder.name)
    writer.add_quantized_by(f"compress {__version__}")
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[most]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in _llama_cpp.parameters(config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    found = vocabulary(source)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.split)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.add_space is not None:
        writer.add_add_space_prefix(found.add_space)
    gguf.SpecialVocab(source.folder, n_vocab=config["vocab_size"]).add_to_gguf(writer, quiet=True)


def check(
    source: PackedSource, schemes: Mapping[str, blocks.Blocks], members: list[Member], path: Path, step: Callable[[str], None]
) -> None:
    """Read the file back with llama.cpp's own reader and compare every value with the source's. Raises VerificationError."""
    gguf = library()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    for member in members:
        found = tensors[member.name]
        stack = found.data if len(member.sources) > 1 or len(member.shape) == 3 else found.data[None]
        for name, data in zip(member.sources, stack, strict=True):
            values = torch.from_numpy(gguf.dequantize(data, found.tensor_type).copy())
            if name in schemes:
                step(name)
            expected = source.tensor(f"{name}.weight" if name in schemes else name).float()
            if not torch.equal(values.reshape(expected.shape), _llama_cpp.reorder(expected, member.heads)):
                raise VerificationError(
                    f"{member.name}: reads back with other values than {name}; the result is not published, please report this"
                )


def reader(path: Path) -> Any:
    """Open a file with llama.cpp's own reader, once its counts are plausible. Raises FormatError."""
    gguf = library()
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            _, _, tensors, keys = struct.unpack("<4sIQQ", stream.read(24))
        if max(tensors, keys) > min(MAX_COUNT, size // _LEAST):
            raise ValueError(f"it announces {tensors:,} tensors and {keys:,} keys in {size:,} bytes")
        return gguf.GGUFReader(str(path))
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise FormatError(f"{path}: cannot be read ({error}); expected a GGUF file. Fetch it again") from error


def digests(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of every tensor of a GGUF file and the SHA-256 of its values as llama.cpp's own reader decodes them."""
    gguf = library()
    try:
        for tensor in reader(path).tensors:
            yield tensor.name, hashlib.sha256(gguf.dequantize(tensor.data, tensor.tensor_type).tobytes()).hexdigest()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise FormatError(f"{path}: cannot be read ({error}); expected a GGUF file. Fetch it again") from error


def examine(path: Path) -> list[str]:
    """Return the problems of a GGUF file: what cannot be read, what llama.cpp needs and lacks, and values that are not finite."""
    gguf = library()
    try:
        opened = reader(path)
    except FormatError as error:
        return [error.message.removeprefix(f"{path}: ")]
    found = []
    architecture = opened.fields.get("general.architecture")
    needed = ["general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"]
    if architecture is not None:
        needed += [f"{architecture.contents()}.block_count", f"{architecture.contents()}.embedding_length"]
    if lacking := [key for key in needed if key not in opened.fields]:
        found.append(f"has no {', '.join(lacking)}, which llama.cpp needs; export or convert it again")
    names = {tensor.name for tensor in opened.tensors}
    if architecture is not None and not lacking:
        count = opened.fields[f"{architecture.contents()}.block_count"].contents()
        empty = [number for number in range(count) if not any(name.startswith(f"blk.{number}.") for name in names)]
        if empty:
            found.append(f"has no tensors of block {empty[0]}, of {count} blocks; fetch it again")
    if "token_embd.weight" not in names:
        found.append("has no token_embd.weight; fetch it again")
    for tensor in opened.tensors:
        if not torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).isfinite().all():
            found.append(f"{tensor.name} holds NaN or infinity; fetch it again")
    return found
