"""Which columns of a table are the images, and which says what is in them."""

import dataclasses
import json

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import tables


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns of a data set that are read."""

  image: str
  told: str | None  # Of the caption, or of the label; of images alone None.
  class_names: tuple[str, ...]  # None of them: it has no labels.

  @property
  def all(self) -> tuple[str, ...]:
    """The names of the columns."""
    return (self.image,) if self.told is None else (self.image, self.told)


def choose(file: tables.File, config: config_lib.DataConfig) -> Columns:
  """Chooses columns: those of the config, the usual ones, or the only ones."""
  kinds = {field.name: _kind(field.type) for field in file.schema}
  classes = _class_names(file.schema)
  image = _choose(file, kinds, "image", config.image_key)
  if config.images_alone:
    return Columns(image, None, ())
  asked = config.captions or config.caption_key is not None
  if asked or (config.captions is None and not classes):
    return Columns(image, _choose(file, kinds, "text", config.caption_key), ())
  if len(classes) != 1 and "label" not in classes:
    raise errors.DataError(
      f"{file.path} should have one column of class labels whose names are in "
      f"the schema, or one called 'label', and has {list(classes)}. "
      "config.data.captions=True takes its texts."
    )
  label = "label" if "label" in classes else next(iter(classes))
  return Columns(image, label, classes[label])


def _choose(file, kinds: dict[str, str], kind: str, asked: str | None) -> str:
  found = [name for name, each in kinds.items() if each == kind]
  if asked in found:
    return asked  # type: ignore[return-value]
  usual = [name for name in ("image", "text", "caption") if name in found]
  if asked is None and (usual or len(found) == 1):
    return (usual or found)[0]
  wanted = "one column" if asked is None else f"the column {asked!r}"
  raise errors.DataError(
    f"{file.path} should have {wanted} of {kind}s, and its columns are "
    + ", ".join(f"{name} ({each})" for name, each in kinds.items())
    + ". config.data.image_key and caption_key name what is to be read."
  )


def _kind(type_) -> str:
  """Returns "image" for bytes or a struct of them, "text", or its own name."""
  types = tables.library().types
  if types.is_struct(type_):
    names = [type_.field(i).name for i in range(type_.num_fields)]
    if "bytes" in names and "image" == _kind(type_.field("bytes").type):
      return "image"
  if types.is_binary(type_) or types.is_large_binary(type_):
    return "image"
  if types.is_string(type_) or types.is_large_string(type_):
    return "text"
  return str(type_)


def _class_names(schema) -> dict[str, tuple[str, ...]]:
  """Returns the names of classes that the schema has, by column."""
  content = (schema.metadata or {}).get(b"huggingface", b"{}")
  try:
    features = json.loads(content)["info"]["features"]
    return {
      name: tuple(feature["names"])
      for name, feature in features.items()
      if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
  except (ValueError, KeyError, TypeError, AttributeError):
    return {}
