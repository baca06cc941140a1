"""Kernels compiled by NVRTC without a GPU: to a cubin, with what the assembler says about registers, and the instructions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compress.kernels import _cuda


@dataclass(frozen=True)
class Compiled:
    """One instantiation for one architecture."""

    registers: int
    stack: int  # bytes
    spills: int  # bytes stored and loaded
    cubin: bytes


def _installed(package: str, pattern: str) -> Path | None:
    """A file that a package brings."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if re.search(pattern, str(file))), None)


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the package nvidia-cuda-nvrtc, which is among the development dependencies on Linux; None if it is not there."""
    path = _installed("nvidia-cuda-nvrtc", r"libnvrtc\.so\.\d+$")
    if path is None:
        return None
    for builtins in path.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins))  # NVRTC looks for it by name, and finds what is loaded
    return ctypes.CDLL(str(path))


def compile_for(kernel: _cuda.Kernel, architecture: str) -> Compiled:
    """Compile an instantiation as CuPy would; an error of the compiler is an AssertionError with its log."""
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    text = _cuda.source(kernel.stem).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"k.cu", 0, None, None) == 0
    assert nvrtc.nvrtcAddNameExpression(program, kernel.name.encode()) == 0
    options = [*_cuda.OPTIONS, "-ftz=true", f"-arch={architecture}", "--ptxas-options=-v"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    log = _read(nvrtc, "ProgramLog", program).decode(errors="replace")
    assert not failed, f"{kernel.name} for {architecture}:\n{log[:4000]}"
    cubin = _read(nvrtc, "CUBIN", program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    used = re.findall(r"Used (\d+) registers", log)
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(used) == len(stack) == 1, log
    return Compiled(int(used[0]), int(stack[0][0]), int(stack[0][1]) + int(stack[0][2]), cubin)


def _read(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, text) == 0
    return text.raw[: size.value]


def instructions(compiled: Compiled) -> list[str]:
    """Return the names of the machine's instructions, one after another."""
    program = _installed("nvidia-cuda-nvdisasm", r"bin/nvdisasm$")
    assert program is not None, "nvidia-cuda-nvdisasm is not installed; it comes with the extra `dev` on Linux"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        listing = subprocess.run([str(program), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, flags=re.MULTILINE)
