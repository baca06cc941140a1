"""CUDA kernels through CuPy: compiled once per device, launched on torch tensors and torch's current stream.

A kernel is an instantiation of a template in a .cu file of this folder. Its source is the shared headers and that file, as one
text without any #include, so that CuPy's cache of compiled kernels, whose key is the text, never serves a stale one.

CUDA graphs can capture launches: memory is torch's, and kernels are compiled and loaded at their first launch on a device, which
must therefore come before a capture; capturing a new kernel is an error, not a broken graph.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels.kernel import Use

HEADERS = ("_device.cuh", "_decode.cuh", "_panel.cuh")
OPTIONS = ("-std=c++17", "-default-device")
OLDEST = (8, 0)  # compute capability: cp.async, bfloat16 in tensor cores
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}  # dtypes of activations, and their names in kernels
_COUNTERS = 1 << 20

Argument = Tensor | np.generic | int | float | None


@dataclass(frozen=True)
class Kernel:
    """An instantiation of a template in the file `stem`.cu, in C++ syntax, and its threads per block."""

    stem: str
    name: str
    threads: int


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that launch shapes depend on."""

    capability: tuple[int, int]
    processors: int
    shared: int  # maximum bytes of shared memory per block


def source(stem: str, headers: Sequence[str] = HEADERS) -> str:
    """Return the text of the headers, followed by that of a .cu file."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in (*headers, f"{stem}.cu"))


@cache
def device(index: int) -> Device:
    """Return the properties of a GPU."""
    import cupy

    shared = int(cupy.cuda.Device(index).attributes["MaxSharedMemoryPerBlockOptin"])
    return Device(torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count, shared)


@cache
def _obstacle(index: int) -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if importlib.util.find_spec("cupy") is None:
        return (
            "CuPy is not installed; pip install 'compress-llm[cuda13]' or 'compress-llm[cuda12]', as the driver's CUDA version is"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; kernels need {OLDEST[0]}.{OLDEST[1]}"
    return None


def obstacle(where: torch.device) -> str | None:
    """Return why no kernel can run on a device, or None if kernels can."""
    if where.type != "cuda":
        return f"tensors are on {where.type}; kernels run on cuda"
    return _obstacle(torch.cuda.current_device() if where.index is None else where.index)


def takes(use: Use) -> bool:
    """Whether kernels multiply such activations: on a GPU, of a supported type, without a gradient."""
    return use.device.type == "cuda" and use.dtype in TYPES and not use.gradient


def why_not(use: Use) -> str | None:
    """Return why no GPU kernel multiplies by such activations, or None if one may."""
    if (why := obstacle(use.device)) is not None:
        return why
    if use.dtype not in TYPES:
        return f"x is {use.dtype}; expected {' or '.join(map(str, TYPES))}"
    return "x needs a gradient, which kernels do not pass on" if use.gradient else None


@cache
def _compiled(kernel: Kernel, index: int) -> Any:
    """Compile and load a kernel on a device. Raises KernelError."""
    import cupy

    if torch.cuda.is_current_stream_capturing():
        raise KernelError(f"{kernel.name}: first used while a CUDA graph is captured; run the model once before the capture")
    module = cupy.RawModule(code=source(kernel.stem), options=OPTIONS, name_expressions=(kernel.name,))
    try:
        with torch.cuda.device(index):
            function = module.get_function(kernel.name)
            # The most that a launch may use; unused shared memory costs nothing.
            function.max_dynamic_shared_size_bytes = device(index).shared
    except cupy.cuda.compiler.CompileException as error:
        raise KernelError(f"{kernel.stem}.cu, {kernel.name}: does not compile on device {index}:\n{error}") from error
    return function


@cache
def _stream(stream: torch.cuda.Stream) -> Any:
    """Return CuPy's object for a stream of torch, also for the default stream, which has no address of its own."""
    import cupy

    if hasattr(stream, "__cuda_stream__") and hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)


def value(argument: Argument) -> np.generic:
    """Return an argument in the type that the kernel reads: address, 32-bit int or 32-bit float. Raises KernelError."""
    if argument is None or isinstance(argument, Tensor):
        return np.uintp(0 if argument is None else argument.data_ptr())
    if isinstance(argument, np.generic):
        return argument
    if isinstance(argument, float):
        return np.float32(argument)
    if not -(2**31) <= argument < 2**31:
        raise KernelError(f"a kernel's argument is {argument}; expected an int of 32 bits. The matrix is too large")
    return np.int32(argument)


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    arguments: Sequence[Argument],
    shared: int,
    where: torch.device,
    reads: Sequence[Tensor] = (),
) -> None:
    """Launch a kernel on torch's current stream of a device, with `shared` bytes of shared memory. Raises KernelError.

    `reads` are tensors that the kernel reaches only through addresses in other tensors.
    """
    index = torch.cuda.current_device() if where.index is None else where.index
    tensors = [a for a in (*arguments, *reads) if isinstance(a, Tensor)]
    if any(tensor.device != torch.device("cuda", index) for tensor in tensors):
        places = sorted({str(tensor.device) for tensor in tensors})
        raise KernelError(f"{kernel.name}: tensors are on {', '.join(places)}; expected all of them on cuda:{index}")
    if max(grid[1:]) > 65535 or shared > device(index).shared:
        limit = device(index).shared
        raise KernelError(f"{kernel.name}: grid {grid} with {shared} bytes; expected 65535 at most and {limit}. Use fewer tokens")
    function = _compiled(kernel, index)
    stream = _stream(torch.cuda.current_stream(index))
    with torch.cuda.device(index):
        function(grid, (kernel.threads, 1, 1), tuple(map(value, arguments)), shared_mem=shared, stream=stream)


@cache
def _arena(index: int) -> list[Tensor]:
    """Zeros that are not yet in use."""
    return [torch.zeros(_COUNTERS, dtype=torch.int32, device=torch.device("cuda", index))]


@cache
def _shared_counters(index: int, pointer: int) -> list[Tensor]:
    return [torch.zeros(1 << 16, dtype=torch.int32, device=torch.device("cuda", index))]


def counters(count: int, where: torch.device) -> Tensor:
    """Return `count` int32 zeros, which the kernel must reset to zero.

    Launches on one stream run in order and share them. A captured launch gets its own, as graphs may run concurrently. These come
    from a supply allocated beforehand, since memory that a capture allocates is not zero when the graph first runs.
    """
    index = torch.cuda.current_device() if where.index is None else where.index
    arena = _arena(index) if not torch.cuda.is_current_stream_capturing() or _arena.cache_info().currsize else []
    if torch.cuda.is_current_stream_capturing():
        if not arena or len(arena[0]) < count:
            return torch.zeros(count, dtype=torch.int32, device=where)  # zeroed by the graph itself
        taken, arena[0] = arena[0][:count], arena[0][count:]
        return taken
    mine = _shared_counters(index, torch.cuda.current_stream(index).cuda_stream)
    if len(mine[0]) < count:
        mine[0] = torch.zeros(count, dtype=torch.int32, device=where)
    return mine[0][:count]
