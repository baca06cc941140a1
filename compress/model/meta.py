"""A model of transformers with its parameters on the meta device and its buffers real."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compress.architecture.config import sees
from compress.errors import CheckpointError

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand)
_LARGEST = 1 << 24  # values of a buffer that is counted up, such as rotary frequencies
_LARGE = 1 << 20  # elements; a parameter above this is never allocated, not even for a moment


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of values that `torch.arange` would make."""
    given = [*args, *(kwargs[name] for name in ("start", "end", "step") if name in kwargs)]
    numbers = [value for value in given if isinstance(value, int | float)]
    start, end, step = {1: (0, *numbers, 1), 2: (*numbers, 1), 3: tuple(numbers)}.get(len(numbers), (0, 0, 1))
    return math.ceil((end - start) / step) if step else 0


class _LargeOnMeta(TorchFunctionMode):
    """Send large allocations to meta: they are parameters that would be moved there anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange and (count := _length(args, kwargs)) > _LARGEST:
            raise ValueError(f"a buffer of {count:,} values; expected at most {_LARGEST:,}")
        if func in _FACTORIES:
            size = args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args
            if all(isinstance(n, int) for n in size) and torch.Size(size).numel() > _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this block, modules get parameters on meta and buffers that are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def auto_class(config: Mapping[str, Any]) -> Any:
    """Return the class of transformers that loads all of a checkpoint with this config.json: also what sees, if it has that."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def decoder_path(model: Any) -> str:
    """Return the path of the language model within a model that may also see, with a dot behind it; "" where it is the whole."""
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{path}." if path else ""


@contextmanager
def without_weights(model: nn.Module, but: str) -> Iterator[None]:
    """Within a `with` statement, parameters outside the modules at `but` are real and zero, and take no memory."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, module in model.named_modules():
        if path == but or path.startswith(f"{but}."):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                before.append((module, name, parameter))
                nothing = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(nothing, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def build_model(config: dict[str, Any], folder: str, dtype: torch.dtype) -> nn.Module:
    """Return the language model of a config with parameters on meta, computing in `dtype`."""
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(loaded, "quantization_config"):
            del loaded.quantization_config
        for key in ("attention_bias", "mlp_bias"):  # which a run may turn on, see `compress.biases`
            if config.get(key):
                setattr(loaded, key, True)
        with parameters_on_meta():
            model: nn.Module = auto_class(config).from_config(loaded, dtype=dtype)
    except Exception as error:  # a config of someone else's goes through code of someone else's: anything may come of it
        kind, why = config.get("model_type"), " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: transformers cannot build model_type {kind!r} ({why}); check config.json") from error
    _keep_float32(model, dtype)
    return model.eval()


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Give what a model class wants in float32 (a router's correction bias) that dtype, as from_pretrained does."""
    wanted = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        wanted |= set(model._keep_in_fp32_modules or ())
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and wanted & {*path.split("."), name}:
                    tensors[name] = (
                        nn.Parameter(tensor.float(), requires_grad=False) if tensors is module._parameters else tensor.float()
                    )
