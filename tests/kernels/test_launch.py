"""Launching through CuPy, with a stand-in for it and for torch's view of a GPU: what is compiled, when, with which arguments."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import KernelError
from compress.kernels import _cuda

KERNEL = _cuda.Kernel("sparse_rows", "sparse_rows<BFloat16, u8>", 256)
CACHES = (_cuda.device, _cuda._obstacle, _cuda._compiled, _cuda._stream, _cuda._arena, _cuda._shared_counters)


class CompileException(Exception):
    pass


class Stream:
    """As torch's: equal where they name the same stream, of which the default one has the address 0."""

    def __init__(self, address: int) -> None:
        self.cuda_stream, self.device_index = address, 0

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.cuda_stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)


class Gpu:
    """What torch and CuPy would say and be told."""

    def __init__(self) -> None:
        self.capturing, self.capability, self.stream = False, (9, 0), 7
        self.modules: list[dict[str, Any]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.fails = False

    def module(self, **options: Any) -> Any:
        self.modules.append(options)
        return self

    def get_function(self, name: str) -> Any:
        if self.fails:
            raise CompileException("error: no")
        gpu = self

        class Function:
            max_dynamic_shared_size_bytes = 0

            def __call__(self, *arguments: Any, **more: Any) -> None:
                gpu.launches.append((self, name, *arguments, more))

        return Function()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    for cached in CACHES:
        cached.cache_clear()
    device = lambda index: SimpleNamespace(attributes={"MaxSharedMemoryPerBlockOptin": 100 << 10})  # noqa: E731
    compiler = SimpleNamespace(CompileException=CompileException)
    stream = SimpleNamespace(from_external=lambda of: ("stream", of.__cuda_stream__()[1]))
    cuda = SimpleNamespace(Device=device, compiler=compiler, Stream=stream)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=gpu.module, cuda=cuda))
    monkeypatch.setattr(_cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nothing = type("Nothing", (), {"__init__": lambda *_: None, "__enter__": lambda self: self, "__exit__": lambda *_: None})
    for name, value in {
        "current_device": lambda: 0,
        "get_device_capability": lambda index: gpu.capability,
        "get_device_properties": lambda index: SimpleNamespace(multi_processor_count=132),
        "is_current_stream_capturing": lambda: gpu.capturing,
        "current_stream": lambda index: Stream(gpu.stream),
        "device": nothing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield gpu  # type: ignore[misc]
    for cached in CACHES:
        cached.cache_clear()


def launch(*arguments: Any, shared: int = 0) -> None:
    _cuda.launch(KERNEL, (3, 2, 1), arguments, shared, torch.device("cuda", 0))


def test_arguments_have_the_types_that_kernels_read() -> None:
    tensor = torch.ones(3)
    for argument, dtype, number in (
        (tensor, np.uintp, tensor.data_ptr()),
        (None, np.uintp, 0),
        (5, np.int32, 5),
        (-(2**31), np.int32, -(2**31)),
        (0.5, np.float32, 0.5),
        (np.int64(2**40), np.int64, 2**40),
        (np.uint32(2**32 - 1), np.uint32, 2**32 - 1),
    ):
        made = _cuda.value(argument)
        assert made.dtype == dtype
        assert made == number
    for wide in (2**31, -(2**31) - 1):
        with pytest.raises(KernelError, match="too large"):
            _cuda.value(wide)


def test_a_kernel_is_compiled_once_and_launched_on_the_current_stream(gpu: Gpu) -> None:
    launch(1, 2.0, shared=60 << 10)
    gpu.stream = 8
    launch(None)
    assert len(gpu.modules) == 1
    options = gpu.modules[0]
    assert options["name_expressions"] == (KERNEL.name,)
    assert options["code"] == _cuda.source("sparse_rows")
    assert "sparse_rows(" in options["code"]
    assert "DEVICE u32 lane_id" in options["code"]
    (function, name, grid, block, arguments, more), second = gpu.launches
    assert (name, grid, block) == (KERNEL.name, (3, 2, 1), (256, 1, 1))
    assert [a.dtype for a in arguments] == [np.int32, np.float32]
    assert more == {"shared_mem": 60 << 10, "stream": ("stream", 7)}
    assert function.max_dynamic_shared_size_bytes == 100 << 10
    assert second[-1]["stream"] == ("stream", 8)
    gpu.stream = 0  # torch's default; torch.cuda.ExternalStream(0) would be a new stream, which waits for nothing
    launch(3)
    assert gpu.launches[-1][-1]["stream"] == ("stream", 0)


def test_a_torch_without_the_protocol_of_streams(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Stream, "__cuda_stream__")
    sys.modules["cupy"].cuda.ExternalStream = lambda address, device: ("external", address, device)
    launch(None)
    assert gpu.launches[-1][-1]["stream"] == ("external", 7, 0)


def test_what_cannot_be_launched(gpu: Gpu) -> None:
    with pytest.raises(KernelError, match="expected all of them on cuda:0"):
        launch(torch.ones(1))
    with pytest.raises(KernelError, match="102400"):
        launch(shared=200 << 10)
    with pytest.raises(KernelError, match="65535"):
        _cuda.launch(KERNEL, (1, 1, 65536), (), 0, torch.device("cuda", 0))
    gpu.capturing = True
    with pytest.raises(KernelError, match="before the capture"):
        launch()
    gpu.capturing, gpu.fails = False, True
    with pytest.raises(KernelError, match="does not compile on device 0"):
        launch()
    gpu.fails = False
    launch()
    gpu.capturing = True
    launch()  # known by now
    assert len(gpu.launches) == 2


def test_why_there_are_no_kernels(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert _cuda.obstacle(cuda) is None
    assert "on cpu" in str(_cuda.obstacle(torch.device("cpu")))
    _cuda._obstacle.cache_clear()
    gpu.capability = (7, 5)
    assert "7.5" in str(_cuda.obstacle(cuda))
    _cuda._obstacle.cache_clear()
    monkeypatch.setattr(_cuda.importlib.util, "find_spec", lambda name: None)
    assert "CuPy is not installed" in str(_cuda.obstacle(cuda))
    _cuda._obstacle.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in str(_cuda.obstacle(cuda))


def test_counters_of_streams_and_of_captures(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(_cuda.torch, "zeros", lambda *size, **options: zeros(*size, dtype=options["dtype"]))
    monkeypatch.setattr(_cuda, "_COUNTERS", 100)
    where = torch.device("cuda", 0)
    gpu.capturing = True
    early = _cuda.counters(10, where)  # before there is a supply: zeroed within the graph
    gpu.capturing = False
    one, same = _cuda.counters(10, where), _cuda.counters(20, where)
    assert one.data_ptr() == same.data_ptr()
    gpu.stream = 8
    other = _cuda.counters(10, where)
    assert other.data_ptr() != one.data_ptr()
    gpu.capturing = True
    taken = [_cuda.counters(40, where) for _ in range(3)]  # the third finds the supply used up
    places = {t.data_ptr() for t in (early, one, other, *taken)}
    assert len(places) == 6
    assert taken[1].data_ptr() == taken[0].data_ptr() + 160
    assert not any(t.any() for t in taken)
