"""A GPU that is not there: tensors that say they are on cuda:0 and lie on the CPU, so that code for a GPU runs without one.

What torch would refuse is refused here: tensors of both devices in one operation, `numpy()` of one on the GPU. Custom operators
run their implementation for CUDA, and kernels are launched on the CPU by `host_cuda`. Nothing here says anything about speed,
streams or what a GPU rounds differently.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import host_cuda
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from compress.kernels import _cuda

CUDA = "cuda"
# A device of another name, for what computes gradients: torch's engine for these asks a device of the type cuda for its streams.
OTHER = "pretended"
_now = {"device": torch.device("cpu")}  # the one that is pretended at present
_GUARD = """
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
template <DeviceType D> struct Quiet final : impl::NoOpDeviceGuardImpl<D> {
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  Device getDevice() const override { return Device(D, 0); }
  Device exchangeDevice(Device) const override { return Device(D, 0); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(D, 0)); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, Device(D, 0)); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, Device(D, 0)); }
};
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
static Hooks hooks;
static Quiet<DeviceType::CUDA> guard;
static Quiet<DeviceType::PrivateUse1> other;
extern "C" void register_guard() {
  if (at::isPrivateUse1HooksRegistered()) return;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  c10::impl::registerDeviceGuard(c10::DeviceType::PrivateUse1, &other);
  c10::register_privateuse1_backend("pretended");
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
"""
aten = torch.ops.aten
# Where tensors of two devices may meet: copies, and places on the CPU in a tensor on the GPU.
_COPIES = {aten._to_copy.default, aten.copy_.default}
_PLACES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}


class OnGpu(torch.Tensor):
    """A tensor that says it is on cuda:0; `numbers` has them."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride() if inner.layout == torch.strided else None,
            storage_offset=inner.storage_offset() if inner.layout == torch.strided else 0,
            dtype=inner.dtype,
            layout=inner.layout,
            device=_now["device"],
            requires_grad=inner.requires_grad,
        )
        made.numbers = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a GPU's tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.numbers!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> OnGpu:
        return OnGpu(self.numbers.clone())


def _is_there(device: Any) -> bool:
    return torch.device(device).type == _now["device"].type


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch as a GPU would, on the CPU. Raises RuntimeError for tensors of two devices."""
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
    here = [leaf for leaf in leaves if not isinstance(leaf, OnGpu) and leaf.dim() > 0]
    if there and here and func not in _COPIES and not (func in _PLACES and isinstance(args[0], OnGpu)):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found {_now['device']} and cpu")
    if there and func.namespace == "compress":
        definition = torch._library.custom_ops.OPDEFS[func._schema.name]
        functions = definition._backend_fns
        with Gpu():
            return functions.get("cuda", functions.get(None))(*args, **kwargs)
    on_gpu = bool(there)
    if "device" in kwargs and kwargs["device"] is not None:
        on_gpu = _is_there(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu") if on_gpu else kwargs["device"]}
    elif func is aten.copy_.default:
        on_gpu = isinstance(args[0], OnGpu)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    known = {id(leaf.numbers): leaf for leaf in there}
    plain_args, plain_kwargs = tree_map_only(OnGpu, lambda t: t.numbers, (args, kwargs))
    # There is no product of 16-bit numbers with sums in float32 on a CPU.
    wide = func is aten.mm.dtype
    result = torch.mm(plain_args[0].float(), plain_args[1].float()) if wide else func(*plain_args, **plain_kwargs)
    for leaf in there:
        assert leaf.shape == leaf.numbers.shape, f"{func} changes the shape of its argument in place, which this GPU cannot"
    if func is aten._to_copy.default and not on_gpu and any(result is t for t in plain_args):
        return result.clone()  # a copy to the CPU shares nothing
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else OnGpu(t), result) if on_gpu else result


class Gpu(TorchDispatchMode):
    """Sees the operations that make tensors on a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def register() -> None:
    """Tell torch that there are such devices, of which nothing is asked: before it computes the first gradient of a process."""
    base = Path(torch.__file__).parent
    key = hashlib.sha256((_GUARD + torch.__version__ + str(base)).encode()).hexdigest()[:24]
    path = Path(tempfile.gettempdir()) / f"compress-guard-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            code, made = Path(work) / "guard.cpp", Path(work) / "guard.so"
            code.write_text(_GUARD)
            options = ["-O0", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{base / 'include'}", f"-L{base / 'lib'}"]
            done = subprocess.run(
                ["g++", *options, str(code), "-o", str(made), "-lc10", "-ltorch_cpu"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[:4000]
            made.rename(path)
    ctypes.CDLL(str(path)).register_guard()
    if not hasattr(torch, OTHER):
        module = ModuleType(OTHER)
        vars(module).update(
            is_available=lambda: True, current_device=lambda: 0, device_count=lambda: 1, is_initialized=lambda: True
        )
        torch._register_device_module(OTHER, module)


class _Graph:
    """What is captured has run; replays do nothing."""

    def replay(self) -> None:
        pass


class _Event:
    """Between two of them a millisecond always passes."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


@contextlib.contextmanager
def pretended(patch: pytest.MonkeyPatch, *kernels: _cuda.Kernel, device: str = CUDA) -> Iterator[host_cuda.Host]:
    """Let torch have a device, of whose kernels some may be compiled beforehand."""
    register()
    before = _now["device"]
    _now["device"] = torch.device(device, 0)
    host = host_cuda.Host(*kernels)
    host.device = host_cuda.DEVICE
    properties = SimpleNamespace(multi_processor_count=4, total_memory=1 << 34, L2_cache_size=1 << 20, major=9, minor=0)
    nothing = contextlib.nullcontext
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nothing(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "a GPU that is not there",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (1 << 34, 1 << 34),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "CUDAGraph": _Graph,
        "graph": lambda graph: nothing(),
        "Event": _Event,
    }.items():
        patch.setattr(torch.cuda, name, value)

    def launch(kernel: Any, grid: Any, arguments: Any, shared: int, where: torch.device, reads: Any = ()) -> None:
        assert where.type == "cuda"
        tensors = [a for a in (*arguments, *reads) if isinstance(a, Tensor)]
        assert all(isinstance(t, OnGpu) for t in tensors), f"{kernel.name}: a tensor is on the CPU"
        plain = [a.numbers if isinstance(a, OnGpu) else a for a in arguments]
        host.launch(kernel, grid, plain, shared, torch.device("cpu"), [t.numbers for t in reads])

    host.install(patch)
    patch.setattr(_cuda, "launch", launch)
    patch.setattr(_cuda, "counters", lambda count, where: OnGpu(host._zeros[:count]))
    patch.setattr(_cuda, "_obstacle", lambda index: None)
    # A parameter that moves is a new one: an old one could not become another kind of tensor.
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Gpu():
            yield host
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        _now["device"] = before
