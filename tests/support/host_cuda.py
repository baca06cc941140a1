"""Kernels on the CPU: their sources compiled by g++ behind tests/kernels/host.h, and launched in the place of CuPy."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda

HOST = Path(__file__).parent.parent / "kernels" / "host.h"
FLAGS = ("-O0", "-std=c++20", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
_TOGETHER = 8  # instantiations in a library
DEVICE = _cuda.Device((9, 0), 4, 100 << 10)


def _program(stem: str, names: Sequence[str]) -> str:
    """The text of a library with one entry for each instantiation: its number of arguments, and the call."""
    headers = [name for name in _cuda.HEADERS if name != "_device.cuh"]
    entries = "\n".join(
        f'extern "C" int count_{i}() {{ return host::count(&{name}); }}\n'
        f'extern "C" void sizes_{i}(int* to) {{ host::sizes(&{name}, to); }}\n'
        f'extern "C" void call_{i}(void** values) {{ host::call<&{name}>(values); }}'
        for i, name in enumerate(names)
    )
    return f"{HOST.read_text()}\n{_cuda.source(stem, headers)}\n{entries}\n"


def library(stem: str, names: tuple[str, ...]) -> ctypes.CDLL:
    """Compile instantiations, once per text: the library stays in the system's temporary folder."""
    text = _program(stem, names)
    key = hashlib.sha256((text + " ".join(FLAGS)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"compress-host-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    path = folder / f"{stem}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            code, made = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
            code.write_text(text)
            done = subprocess.run(["g++", *FLAGS, str(code), "-o", str(made)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:4000]
            made.rename(path)
    return ctypes.CDLL(str(path))


class Host:
    """Takes the place of CuPy: `monkeypatch.setattr(_cuda, "launch", Host().launch)`, and so on, see `install`.

    Kernels named beforehand are compiled some together, which saves g++ most of its time; others when they are first launched.
    """

    def __init__(self, *kernels: _cuda.Kernel, device: _cuda.Device = DEVICE, seed: int = 0) -> None:
        self.device, self.seed = device, seed
        self.launched: list[tuple[_cuda.Kernel, tuple[int, int, int]]] = []
        self._zeros = torch.zeros(1 << 12, dtype=torch.int32)
        self._entries: dict[str, tuple[ctypes.CDLL, int]] = {}
        names: dict[str, list[str]] = {}
        for kernel in kernels:
            if kernel.name not in names.setdefault(kernel.stem, []):
                names[kernel.stem].append(kernel.name)
        chunks = [(stem, tuple(of[i : i + _TOGETHER])) for stem, of in names.items() for i in range(0, len(of), _TOGETHER)]
        with ThreadPoolExecutor(2) as pool:
            for (_, chunk), loaded in zip(chunks, pool.map(lambda chunk: library(*chunk), chunks), strict=True):
                self._entries |= {name: (loaded, i) for i, name in enumerate(chunk)}

    def install(self, patch) -> Host:  # type: ignore[no-untyped-def]
        """Let the package launch here."""
        patch.setattr(_cuda, "launch", self.launch)
        patch.setattr(_cuda, "device", lambda index: self.device)
        patch.setattr(_cuda, "counters", lambda count, where: self._zeros[:count])
        return self

    def check_counters(self) -> None:
        assert not self._zeros.any()

    def _entry(self, kernel: _cuda.Kernel) -> tuple[ctypes.CDLL, int]:
        if kernel.name not in self._entries:
            self._entries[kernel.name] = library(kernel.stem, (kernel.name,)), 0
        return self._entries[kernel.name]

    def launch(
        self,
        kernel: _cuda.Kernel,
        grid: tuple[int, int, int],
        arguments: Sequence[_cuda.Argument],
        shared: int,
        where: torch.device,
        reads: Sequence[Tensor] = (),
    ) -> None:
        """As `_cuda.launch`; what went wrong in a kernel is raised as KernelError."""
        assert where.type == "cpu"
        assert shared <= self.device.shared
        loaded, i = self._entry(kernel)
        values = [np.asarray(_cuda.value(argument)) for argument in arguments]
        sizes = (ctypes.c_int * 64)()
        getattr(loaded, f"sizes_{i}")(sizes)
        expected = list(sizes[: getattr(loaded, f"count_{i}")()])
        kinds = [size < 0 for size in expected]  # pointers
        assert [abs(size) for size in expected] == [v.itemsize for v in values], f"{kernel.name}: {expected}"
        assert kinds == [a is None or isinstance(a, Tensor) for a in arguments], f"{kernel.name}: pointers and numbers differ"
        tensors = [a for a in (*arguments, *reads) if isinstance(a, Tensor)]
        spans = [bound for t in tensors for bound in _span(t)]
        loaded.launch.restype = ctypes.c_char_p
        message = loaded.launch(
            getattr(loaded, f"call_{i}"),
            (ctypes.c_uint * 3)(*grid),
            kernel.threads,
            (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values)),
            (ctypes.c_void_p * len(spans))(*spans),
            len(tensors),
            ctypes.c_size_t(shared),
            self.seed,
        )
        self.launched.append((kernel, grid))
        if message:
            raise KernelError(f"{kernel.name}: {message.decode()}")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address, and the first beyond: of what the tensor shows, not of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def templates(stem: str) -> list[str]:
    """The names of the kernels in a .cu file."""
    return re.findall(r"KERNEL\([^)]*\)\s*(\w+)\(", _cuda.source(stem, ()))
