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


def _listing(compiled: Compiled) -> str:
    program = _installed("nvidia-cuda-nvdisasm", r"bin/nvdisasm$")
    assert program is not None, "nvidia-cuda-nvdisasm is not installed; it comes with the extra `dev` on Linux"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        return subprocess.run([str(program), "-c", file.name], capture_output=True, text=True, check=True).stdout


_INSTRUCTION = r"^\s+/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][\w.]*)(.*)"


def instructions(compiled: Compiled) -> list[str]:
    """Return the names of the machine's instructions, one after another."""
    return [found[1] for found in re.findall(_INSTRUCTION, _listing(compiled), flags=re.MULTILINE)]


def shortest_round(compiled: Compiled, product: str, products: int) -> list[str]:
    """Return the instructions of the shortest way round the loop with tensor-core products, through so many of them and a copy.

    That is what a round costs in the case that the kernel is made for; branches lead to what other cases need besides.
    """
    code: list[tuple[bool, str, str]] = []  # under a predicate, name, operands
    labels: dict[str, int] = {}
    for line in _listing(compiled).splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(_INSTRUCTION, line):
            code.append((bool(found[1]), found[2], found[3]))

    def target(at: int) -> int | None:
        jump = re.search(r"`\((\.L_\w+)\)", code[at][2]) if code[at][1].startswith("BRA") else None
        return None if jump is None else labels[jump[1]]

    backward = [(to, at) for at in range(len(code)) if (to := target(at)) is not None and to <= at]
    around = [(to, at) for to, at in backward if any(name.startswith(product) for _, name, _ in code[to:at])]
    first, last = min(around, key=lambda loop: loop[1] - loop[0])
    # Way to each instruction by what was met before it: length, products so far and whether there was a copy -> the one before.
    ways: list[dict[tuple[int, bool], tuple[int, list[str]]]] = [{} for _ in range(last + 1)]
    ways[first][0, False] = (0, [])
    for at in range(first, last + 1):
        predicated, name, _ = code[at]
        for (met, copied), (length, names) in ways[at].items():
            state = (min(products, met + name.startswith(product)), copied or name.startswith("LDGSTS"))
            way = (length + 1, [*names, name])
            if at == last and state == (products, True):
                return way[1]
            to = target(at)
            further = [] if to is None else [to]
            if to is None or predicated or name != "BRA":
                further.append(at + 1)
            for after in further:
                if at < after <= last and (state not in ways[after] or ways[after][state][0] > way[0]):
                    ways[after][state] = way
    raise AssertionError(f"no way round the loop from {first} to {last} with {products} times {product} and a copy")


def _read(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, text) == 0
    return text.raw[: size.value]
