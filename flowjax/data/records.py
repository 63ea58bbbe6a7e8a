"""A record as raw bytes: fields of one fixed layout, and a caption behind them.

All records of a folder have the same fields, so that a batch is read by joining
its bytes: nothing is parsed, and each number is copied twice. The bytes are
little-endian, as every processor that JAX runs on has them.
"""

# Shape suffixes: B batch.

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

# bfloat16 comes with JAX; numpy knows it once ml_dtypes is imported.
FLOATS = ("float32", "float16", ml_dtypes.bfloat16.__name__)
DTYPES = (*FLOATS, "uint8", "int32", "int64", "bool")


@dataclasses.dataclass(frozen=True)
class Field:
  """One array of every record."""

  name: str
  dtype: str
  shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
  """The fields of a record in their order; `captioned`: text follows them."""

  fields: tuple[Field, ...]
  captioned: bool = False

  @functools.cached_property
  def dtype(self) -> np.dtype:
    """The fields as numpy has them, without gaps."""
    return np.dtype([(f.name, np.dtype(f.dtype), f.shape) for f in self.fields])

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(field.name for field in self.fields)

  def pack(
    self, values: Mapping[str, Any], captions: Sequence[str] = ()
  ) -> list[bytes]:
    """Returns the records of arrays that have a first dim of examples.

    Raises OverflowError with the name of a field that is not finite in its
    dtype, where it was before.
    """
    count = len(values[self.fields[0].name])
    packed_B = np.empty(count, self.dtype)
    for field in self.fields:
      array = np.asarray(values[field.name])
      with np.errstate(over="ignore"):
        packed_B[field.name] = array.astype(field.dtype)
      if field.dtype in FLOATS:
        _check_finite(field, array, packed_B[field.name])
    parts = [packed.tobytes() for packed in packed_B]
    if self.captioned:
      parts = [
        part + caption.encode()
        for part, caption in zip(parts, captions, strict=True)
      ]
    return parts

  def unpack(self, parts: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Returns the fields of records, each stacked; "caption" is an array too.

    Raises ValueError where one is too short.
    """
    size = self.dtype.itemsize
    for part in parts:
      if len(part) < size or (len(part) > size and not self.captioned):
        raise ValueError(
          f"it has {len(part)} bytes, and the fields of the index {size}"
        )
    whole = b"".join([memoryview(part)[:size] for part in parts])
    packed_B = np.frombuffer(whole, self.dtype)
    found = {name: np.ascontiguousarray(packed_B[name]) for name in self.names}
    if self.captioned:
      texts = [bytes(part[size:]).decode() for part in parts]
      found["caption"] = np.array(texts, object)
    return found

  def to_json(self) -> dict[str, Any]:
    return {
      "fields": [[f.name, f.dtype, list(f.shape)] for f in self.fields],
      "captioned": self.captioned,
    }

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "Layout":
    """Reads what `to_json` wrote; raises ValueError for what it did not."""
    fields = tuple(
      Field(str(name), str(dtype), tuple(map(int, shape)))
      for name, dtype, shape in values["fields"]
    )
    for field in fields:
      if field.dtype not in DTYPES or min(field.shape, default=1) < 1:
        raise ValueError(f"the field {field} cannot be")
    return cls(fields, bool(values["captioned"]))


def _check_finite(field: Field, before: np.ndarray, after: np.ndarray) -> None:
  bad = ~np.isfinite(after)
  if bad.any() and np.isfinite(before[bad]).any():
    largest = np.abs(before[np.isfinite(before)]).max()
    raise OverflowError(
      f"{field.name!r} goes up to {largest:.3g}, which {field.dtype} does not "
      "hold: store it as bfloat16."
    )
