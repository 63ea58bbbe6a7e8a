"""The frozen parts of a pipeline of diffusers, which stand beside a network.

Texts become conditions as the pipeline's own `encode_prompt` makes them, and
images become latents, and come back, by its autoencoder. A part is read from
the folder when it is first asked for.
"""

# Shape suffixes: B batch, L tokens of a text, E its width, P width of the
# pooled text, H height, W width, C channels; N rows of any kind.

import collections.abc
import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flowjax import errors
from flowjax.data import embeddings, tokenizer_files
from flowjax.interop import (
  folder_export,
  frozen_parts,
  pipelines,
  shards,
  text_encoders,
  vae,
  weights,
)

# How many tokens T5 reads in each pipeline, unless another number is asked for.
T5_TOKENS = {"sd3": 256, "flux": 512}
DTYPES = ("bfloat16", "float32")
_SAMPLED = 64  # numbers of a tensor that are looked at for a fingerprint

Captions = collections.abc.Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
  """The parts of one folder; made by `open`."""

  folder: pathlib.Path
  kind: str
  index: dict[str, Any]
  mesh: Mesh | None
  dtype: str
  text_tokens: int
  keep: bool
  _held: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def text_length(self) -> int:
    """How many tokens a text has."""
    if self.kind == "flux":
      return self.text_tokens
    return self._tokenizer("text_encoder").length + self.text_tokens

  @property
  def parts(self) -> tuple[embeddings.Part, ...]:
    """Where the words of each encoder are; all else is zero."""
    found: list[embeddings.Part] = []
    column, start = 0, 0
    clip_tokens = self.text_length - self.text_tokens
    for name in pipelines.encoders(self.index):
      config = text_encoders.open(self.folder / name).config
      if config.name == "t5":
        tokens = clip_tokens, self.text_length
        found.append(embeddings.Part(name, tokens, (0, config.width)))
        continue
      pooled = start, start + config.pooled_width
      start = pooled[1]
      if not clip_tokens:
        found.append(embeddings.Part(name, pooled=pooled))
        continue
      columns = column, column + config.width
      column = columns[1]
      found.append(embeddings.Part(name, (0, clip_tokens), columns, pooled))
    return tuple(found)

  def texts(self, captions: Captions) -> dict[str, np.ndarray]:
    """Returns text [B, L, E] and pooled [B, P] of captions, in float32.

    As in the pipelines of diffusers no encoder is told what is padding.
    """
    return self._sd3(captions) if self.kind == "sd3" else self._flux(captions)

  @property
  def embeds(self) -> int:
    """How many numbers its image encoder makes of an image; 0: it has none."""
    if not pipelines.has_image_encoder(self.index):
      return 0
    folder = self.folder / pipelines.IMAGE_ENCODER
    return text_encoders.open(folder).config.projection

  def embed(self, x_BHWC: Any) -> np.ndarray:
    """Returns embeddings [B, P] of images in [-1, 1], of any size."""
    part = self._part(pipelines.IMAGE_ENCODER)
    return frozen_parts.on_rows(part, "embed", x_BHWC, self.mesh)

  def truncated(self, captions: Captions) -> dict[str, np.ndarray]:
    """Says of which captions each encoder reads the beginning alone: bool [B].

    The names are those of the encoders.
    """
    return {
      name: self._tokenizer(name).truncated(captions)
      for name in pipelines.encoders(self.index)
    }

  def encode(self, x_BHWC: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and log-variance of the latents of images in [-1, 1].

    They are shifted and scaled as the network learns them.
    """
    return frozen_parts.on_rows(self._part("vae"), "encode", x_BHWC, self.mesh)

  def decode(
    self, z_BHWC: Any, at_once: int | None = None, *, tiled: bool = False
  ) -> np.ndarray:
    """Returns images, near [-1, 1], of latents as the network draws them.

    So many `at_once`, by default all. If `tiled`, large ones are put together
    of tiles of the size that the autoencoder was trained at.
    """
    what = "decode_tiled" if tiled else "decode"
    return frozen_parts.on_rows(
      self._part("vae"), what, z_BHWC, self.mesh, at_once
    )

  def fingerprint(self) -> dict[str, Any]:
    """Returns what tells these parts from others, as JSON can hold it.

    Of weights that is a digest of their keys, their shapes, and some numbers of
    each.
    """
    found: dict[str, Any] = {
      "pipeline": self.index["_class_name"],
      "dtype": self.dtype,
      "text_tokens": self.text_tokens,
    }
    named = [*pipelines.encoders(self.index), pipelines.VAE]
    if pipelines.has_image_encoder(self.index):
      named.append(pipelines.IMAGE_ENCODER)
    for name in named:
      found[name] = _digest(self.folder / name)
    return found

  def check(self, model: Any) -> None:
    """Raises UserError for parts that do not fit, each other or the network.

    Of weights only headers are read.
    """
    vae.find(self.folder / pipelines.VAE)
    text, pooled = model.text_width, 0
    for name in pipelines.encoders(self.index):
      found = self._found(name)
      found.leaves()
      if found.config.name == "clip":
        pooled += found.config.pooled_width
      else:
        text = found.config.text_width
    for what, ours, theirs in (
      ("text_width", model.text_width, text),
      ("pooled_width", model.pooled_width, pooled),
    ):
      if ours != theirs:
        raise errors.UserError(
          f"{self.folder}: its text encoders make {what} = {theirs}, and the "
          f"transformer reads {ours}: they are of different pipelines."
        )

  def free(self) -> None:
    """Lets go of all that was read; it is read again when it is needed."""
    self._held.clear()

  def _sd3(self, captions: Captions) -> dict[str, np.ndarray]:
    """Combines two CLIPs and T5 (arXiv:2403.03206, figure 2).

    What the CLIPs say before their last blocks is one text, as wide as both and
    filled with zeros to the width of T5, whose tokens come after. Without T5
    they are zeros. The pooled text is that of both.
    """
    pair = [
      self._encoded(name, captions)
      for name in ("text_encoder", "text_encoder_2")
    ]
    clip_BLE = np.concatenate([text_BLE for text_BLE, _ in pair], axis=-1)
    if "text_encoder_3" in pipelines.encoders(self.index):
      t5_BLE, _ = self._encoded("text_encoder_3", captions)
    else:
      width = pipelines.text_width(self.folder)
      t5_BLE = np.zeros((len(captions), self.text_tokens, width), np.float32)
    missing = t5_BLE.shape[-1] - clip_BLE.shape[-1]
    if missing < 0:
      raise errors.UserError(
        f"{self.folder}: the texts of both CLIPs are {clip_BLE.shape[-1]} "
        f"wide, more than the {t5_BLE.shape[-1]} of T5."
      )
    clip_BLE = np.pad(clip_BLE, ((0, 0), (0, 0), (0, missing)))
    return {
      "text": np.concatenate([clip_BLE, t5_BLE], axis=1),
      "pooled": np.concatenate([pooled_BP for _, pooled_BP in pair], axis=-1),
    }

  def _flux(self, captions: Captions) -> dict[str, np.ndarray]:
    """Takes the text of T5, and the pooled text of CLIP."""
    _, pooled_BP = self._encoded("text_encoder", captions)
    text_BLE, _ = self._encoded("text_encoder_2", captions)
    return {"text": text_BLE, "pooled": pooled_BP}

  def _encoded(self, name: str, captions: Captions) -> tuple[np.ndarray, Any]:
    """Returns the text that one encoder makes, and the pooled text of CLIP."""
    token_BL, _ = self._tokenizer(name)(captions)
    return frozen_parts.on_rows(self._part(name), "texts", token_BL, self.mesh)

  def _tokenizer(self, encoder: str) -> tokenizer_files.FromFiles:
    """Returns the tokenizer of an encoder; it cuts where the pipeline does."""
    name = encoder.replace("text_encoder", "tokenizer")
    if name not in self._held:
      length = None
      if pipelines.encoders(self.index)[encoder] == pipelines.T5:
        length = self.text_tokens
      elif (
        encoder != "text_encoder"
      ):  # Both CLIPs read the length of the first.
        length = self._tokenizer("text_encoder").length
      self._held[name] = tokenizer_files.read(self.folder / name, length)
    return self._held[name]

  def _part(self, name: str) -> frozen_parts.Part:
    """Returns a part, read unless it is held already."""
    if name in self._held:
      return self._held[name]
    folder, over = self.folder / name, (self.mesh, self.dtype)
    if name == pipelines.VAE:
      part = frozen_parts.latent_coder(folder, *over)
    elif name == pipelines.IMAGE_ENCODER:
      part = frozen_parts.image_encoder(folder, *over)
    else:
      skip = int(self.kind == "sd3")
      part = frozen_parts.text_encoder(self._found(name), *over, skip)
    if self.keep:
      self._held[name] = part
    return part

  def _found(self, name: str) -> text_encoders.Found:
    """Returns an encoder that knows all that its tokenizer makes."""
    found = text_encoders.open(self.folder / name)
    tokenizer = self._tokenizer(name)
    if tokenizer.vocabulary > found.config.vocabulary:
      raise errors.UserError(
        f"{tokenizer.folder} has {tokenizer.vocabulary} tokens, and {name} "
        f"knows {found.config.vocabulary}: they are of different pipelines."
      )
    return found


def open(
  folder: pathlib.Path | str,
  *,
  mesh: Mesh | None = None,
  dtype: str = "bfloat16",
  text_tokens: int | None = None,
  keep: bool = True,
) -> Frozen:
  """Opens the folder of a pipeline; of its parts nothing is read yet.

  Over the `mesh` captions and images are dealt out, and encoders divided.
  `text_tokens` is how many tokens T5 reads. What was read is kept in memory,
  or, with `keep` false, let go when it has answered. Raises UserError for a
  pipeline that is not ours, and for a part of another class.
  """
  folder = pathlib.Path(folder)
  if dtype not in DTYPES:
    raise errors.UserError(
      f"dtype = {dtype!r}: frozen parts compute in bfloat16 or float32; in "
      "float16 T5 overflows."
    )
  index = pipelines.read_index(folder)
  kind = pipelines.require_kind(folder, index)
  tokens = text_tokens or T5_TOKENS[kind]
  return Frozen(folder, kind, index, mesh, dtype, tokens, keep)


def _digest(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what tells a part in a folder from others of its class."""
  content = pipelines.read_json(folder / "config.json")
  is_vae = folder.name == pipelines.VAE
  stem = folder_export.STEMS["diffusers"] if is_vae else text_encoders.STEM
  tensors = shards.read(weights.find(folder, stem), text_encoders.is_weight)
  digest = hashlib.blake2b(digest_size=16)
  for key in sorted(tensors):
    tensor = tensors[key].reshape(-1)
    some = tensor[:: max(1, tensor.size // _SAMPLED)]
    digest.update(f"{key} {tensors[key].shape} {tensor.dtype}".encode())
    digest.update(some.tobytes())
  factors = ("scaling_factor", "shift_factor")
  told = {key: content[key] for key in factors if key in content}
  return {**told, "weights": digest.hexdigest()}
