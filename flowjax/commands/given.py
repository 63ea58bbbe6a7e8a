"""What a user gives to `sample`: captions, embedded texts, starts, images."""

# Shape suffixes: N rows, L text tokens, E width of the text, P width of the
# pooled text, H height, W width, C channels.

import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from flowjax import errors, models
from flowjax.commands import drawing, flags, restored
from flowjax.data import images, sources
from flowjax.interop import frozen, pipelines
from flowjax.train import aspects

# No caption is longer, in characters.
LONGEST = 10_000
_KEYS = ("text", "pooled", "text_mask")
_NEGATIVE = "negative_"


def add_flags(parser) -> None:
  """Adds the flags of what is read here."""
  parser.add_argument(
    "--embeddings", type=flags.path, help="embedded texts, in turn: a .npz"
  )
  parser.add_argument(
    "--prompt",
    action="append",
    help="a caption; once more for one more, which come in turn",
  )
  parser.add_argument(
    "--prompts", type=flags.path, help="a file of captions, one a line"
  )
  parser.add_argument(
    "--negative-prompt",
    dest="negative_prompt",
    help="a caption to be guided away from, instead of from the empty one",
  )
  parser.add_argument(
    "--start",
    type=flags.path,
    help="what to start from instead of noise: a .npy of [N, H, W, C]",
  )
  parser.add_argument(
    "--original-size",
    dest="original_size",
    type=flags.pixels,
    help="what a network that is told sizes hears of the original: small is "
    "blurred; default: the size of the images",
  )
  parser.add_argument(
    "--crop",
    type=flags.offset,
    help="what it hears of how far from the top and the left it was cut, as "
    "64,0; default: 0,0",
  )


def captions(args) -> list[str]:
  """Returns those of --prompt, and then those of --prompts, a line each."""
  found = list(args.prompt or [])
  if args.prompts:
    flag = f"--prompts={args.prompts}"
    try:
      lines = args.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
      raise errors.UserError(f"{flag} cannot be read: {error}.") from error
    found += [line for line in map(str.strip, lines) if line]
    if not found:
      raise errors.UserError(f"{flag} has no caption in it: one a line.")
  for caption in (*found, args.negative_prompt or ""):
    if len(caption) > LONGEST:
      raise errors.UserError(
        f"A prompt has {len(caption)} characters, and at most {LONGEST} are "
        f"read: {caption[:40]!r} ..."
      )
  return found


def prompts(
  captions: list[str], negative: str | None, found: restored.Restored
) -> dict[str, Any]:
  """Returns captions as the network is told them; guidance is from `negative`.

  Without it, that is the empty caption. Raises UserError for a network that
  reads none, and for a caption that it cannot be told as it is.
  """
  cond: dict[str, Any] = _told(captions, found)
  if negative is not None:
    row = _told([negative], found)
    cond["negative"] = {
      key: np.repeat(value, len(captions), axis=0) for key, value in row.items()
    }
  return cond


def _told(captions: list[str], found: restored.Restored) -> dict[str, Any]:
  """Returns captions by the encoder that this run has."""
  if tokenizer := found.config.data.build_tokenizer():
    for caption in captions:
      tokenizer.require(caption)
    token_BL, mask_BL = tokenizer(captions)
    return {"token": token_BL, "token_mask": mask_BL}
  raise errors.UserError(
    f"--prompt: the network of {found.directory} reads no captions: "
    + (
      "it was trained on embedded texts, give --embeddings."
      if drawing.reads_text(found.run.network)
      else "it is told nothing."
      if models.told(found.config.model) == "nothing"
      else "it is told labels, as by --labels=3,1,4."
    )
  )


def texts(path: pathlib.Path, found: restored.Restored) -> dict[str, Any]:
  """Reads --embeddings, a .npz file, as the network takes them.

  Where only the texts or only the negative ones have a mask, the others get one
  of ones: none of their tokens is padding. Raises UserError for anything that
  the network cannot be told.
  """
  flag = f"--embeddings={path}"
  if not drawing.reads_text(found.run.network):
    raise errors.UserError(
      f"{flag} are texts, and this network reads none: it is told labels, as "
      "--labels=3,1,4, or nothing."
    )
  if drawing.reads_captions(found.run.network):
    raise errors.UserError(
      f"{flag} are embedded texts, and this network reads captions: "
      "--prompt='...'."
    )
  arrays = _load(path, "--embeddings")
  if isinstance(arrays, np.ndarray):
    raise errors.UserError(
      f"{flag} holds one array; it must be a .npz file with 'text' and "
      "'pooled'."
    )
  _check_names(flag, arrays)
  model = found.config.model
  cond: dict[str, Any] = _group(
    flag, arrays, "", ("N", "L", model.text_width), model
  )
  if _NEGATIVE + "text" in arrays:
    shape = cond["text"].shape
    negative = _group(flag, arrays, _NEGATIVE, shape, model)
    if "text_mask" in cond or "text_mask" in negative:
      for group in (cond, negative):
        group.setdefault("text_mask", np.ones(shape[:2], bool))
    cond["negative"] = negative
  return cond


def start(path: pathlib.Path, found: restored.Restored) -> np.ndarray:
  """Reads --start, a .npy file of what is drawn from instead of noise."""
  array, model = _load(path, "--start"), found.config.model
  shape = ("N", *model.image_size, model.channels)
  if not isinstance(array, np.ndarray):
    raise errors.UserError(
      f"--start={path} holds several arrays; it must be a .npy file of one, of "
      f"{_shown(shape)}."
    )
  return _numbers(f"--start={path}", array, shape)


def reader(
  found: restored.Restored, parts: frozen.Frozen | None, shrunk: int = 1
) -> images.Reader:
  """Returns what reads images of the size that is drawn, or `shrunk` of it."""
  model = found.config.model
  factor = pipelines.factor(parts.folder) if parts else 1
  height, width = (factor * side // shrunk for side in model.image_size)
  return images.Reader(
    (height, width, 3 if parts else model.channels),
    found.config.data.max_pixels,
    originals=True,
  )


def image(
  path: pathlib.Path, reader: images.Reader, flag: str
) -> dict[str, np.ndarray]:
  """Reads an image that a flag names: its record."""
  try:
    content = path.read_bytes()
  except OSError as error:
    raise errors.UserError(f"{flag}={path} cannot be read: {error}.") from error
  try:
    return reader.record(content, f"{flag}={path}")
  except images.TooLarge:
    raise
  except sources.Corrupt as error:
    raise sources.Corrupt(
      f"{error} Take a whole copy of it, or another image."
    ) from error


def sizes(args, found: restored.Restored, count: int) -> dict[str, Any]:
  """Returns what --original-size and --crop tell the network, if it is told.

  By default that nothing was cut off an original of the size that is drawn.
  """
  if aspects.is_told_sizes(found.config.model):
    size = drawing.drawn_size(found.run)
    crop = args.crop or (0, 0)
    told = aspects.whole(size, count, args.original_size, crop)
    return {"size_crop": told}
  if args.original_size or args.crop:
    raise errors.UserError(
      "--original-size and --crop are for a network that is told sizes "
      f"(config.model.size_conditioning); that of {found.directory} is not."
    )
  return {}


def _check_names(flag: str, arrays: dict[str, np.ndarray]) -> None:
  """Raises UserError for a name too many, or without those it goes with."""
  for name in arrays:
    if name.removeprefix(_NEGATIVE) not in _KEYS:
      raise errors.UserError(
        f"{flag} has {name!r}; it is to hold 'text', 'pooled', 'text_mask', "
        "and each of these with 'negative_' before it."
      )
  prefixes = [""]
  if any(name.startswith(_NEGATIVE) for name in arrays):
    prefixes.append(_NEGATIVE)
  for prefix in prefixes:
    if not {f"{prefix}text", f"{prefix}pooled"} <= arrays.keys():
      raise errors.UserError(
        f"{flag} must hold '{prefix}text' and '{prefix}pooled'; found "
        f"{', '.join(sorted(arrays)) or 'nothing'}."
      )


def _group(flag, arrays, prefix, shape, model) -> dict[str, np.ndarray]:
  """Returns the text, pooled and mask whose names have a prefix."""

  def read(key, shape):
    name = prefix + key
    return _numbers(f"{flag}: {name!r}", arrays[name], shape)

  group = {"text": read("text", shape)}
  rows, length, _ = group["text"].shape
  group["pooled"] = read("pooled", (rows, model.pooled_width))
  if f"{prefix}text_mask" in arrays:
    mask_NL = read("text_mask", (rows, length))
    if not np.isin(mask_NL, (0.0, 1.0)).all():
      raise errors.UserError(
        f"{flag}: '{prefix}text_mask' must hold 1 for a token and 0 for "
        f"padding; it goes from {mask_NL.min():g} to {mask_NL.max():g}."
      )
    group["text_mask"] = mask_NL.astype(bool)
  return group


def _numbers(
  where: str, array: np.ndarray, shape: tuple[int | str, ...]
) -> np.ndarray:
  """Returns an array in float32; letters of `shape` stand for any size.

  Raises UserError for another shape, no rows, and what is no finite number.
  """
  fits = array.ndim == len(shape) and all(
    size > 0 if isinstance(wanted, str) else size == wanted
    for size, wanted in zip(array.shape, shape, strict=True)
  )
  if not fits:
    raise errors.UserError(
      f"{where} has the shape {_shown(array.shape)}; it must be "
      f"{_shown(shape)}" + (", at least one of each." if "N" in shape else ".")
    )
  if array.dtype.kind not in "fiub":
    raise errors.UserError(
      f"{where} holds {array.dtype}; it must hold real numbers: float32."
    )
  with np.errstate(over="ignore"):
    array = array.astype(np.float32)
  broken = array.size - np.isfinite(array).sum()
  if broken:
    raise errors.UserError(
      f"{where}: {broken} of its {array.size} numbers are not finite in "
      "float32; write it again from sound ones."
    )
  return array


def _shown(shape) -> str:
  return f"[{', '.join(map(str, shape))}]"


def _load(path: pathlib.Path, flag: str) -> Any:
  """Returns the array of a .npy file, or those of a .npz file by name."""
  try:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
      return loaded
    # A member that is no array comes as bytes.
    return {name: np.asarray(loaded[name]) for name in loaded.files}
  except (
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise errors.UserError(f"{flag}={path} cannot be read: {error}.") from error
