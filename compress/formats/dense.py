"""`dense`: a `Dense` part as bytes, the values unchanged; under a mask only those that are kept, see `_masked`.

values    BF16, F16 or F32 (out, in); under a mask (fields,), row by row
pointers  I32 (ceil(out / 32) + 1,)   under a mask whose rows keep different numbers: where every 32 rows begin in the values
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit, _masked
from compress.weights.dense import DENSE_DTYPES, Dense
from compress.weights.kept_values import Stream

_NAMES = {dtype: name for name, dtype in DENSE_DTYPES.items()}
_KEYS = ("format", "dtype", *_masked.KEYS)


class DenseValues:
    """The bijection between a Dense part and named tensors."""

    name = "dense"
    part = Dense
    roles = ("base",)
    masked = True

    def describe(self, part: Dense, keep: Tensor | None = None) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        described = {"format": self.name, "dtype": _NAMES[part.values.dtype]}
        return described if keep is None else described | _masked.describe(Stream.of(keep, 1))

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        return str(described["dtype"])

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> _masked.Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"dense: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        dtype = described.get("dtype")
        if not (isinstance(dtype, str) and dtype in DENSE_DTYPES):
            raise FormatError(f"dense: dtype is {dtype!r:.80}; expected one of {', '.join(DENSE_DTYPES)}")
        layout = _masked.layout(described, shape, 1)
        under = any(key in described for key in _masked.KEYS)
        return layout | {"values": (DENSE_DTYPES[dtype], (_masked.fields(described, shape),) if under else shape)}

    def pack(self, part: Dense, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors of a part; under a mask `keep` (out, in), only of what it keeps."""
        if keep is None:
            return {"values": part.values.contiguous()}
        stream = Stream.of(keep, 1)
        return _masked.pointers(stream) | {"values": stream.compact(part.values)}

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        _masked.check(described, tensors, 1)

    def unpack(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], keep: Tensor | None = None
    ) -> Dense:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        self.check(described, shape, tensors)
        stream = _masked.stream(self.name, described, tensors, keep, 1)
        return Dense(tensors["values"] if stream is None else stream.spread(tensors["values"]))

    def cut_rows(
        self,
        described: dict[str, Any],
        shape: tuple[int, int],
        tensors: dict[str, Tensor],
        start: int,
        stop: int,
        keep: Tensor | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop under their mask; `start` is a multiple of 32."""
        if not any(key in described for key in _masked.KEYS):
            return described, {"values": tensors["values"][start:stop]}
        fewer, (first, last), pointers = _masked.cut(described, shape[1], tensors, start, stop, 1, keep)
        return fewer, pointers | {"values": tensors["values"][first:last]}


FORMAT = DenseValues()
