"""One frozen part of a pipeline: read over a mesh, and run on rows.

Each device keeps its slice of a part, and no device ever holds a large encoder
whole.
"""

# Shape suffixes: B batch, H height, W width, C channels; N rows of any kind.

import collections.abc
import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowjax.interop import safetensors, tables, text_encoders, vae
from flowjax.models import autoencoder, clip_vision, tiles
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing, rules


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """A network that was read, and what it computes: `run(params, rows)`."""

  config: Any
  params: Any
  run: collections.abc.Mapping[str, collections.abc.Callable[..., Any]]


def text_encoder(
  found: text_encoders.Found, mesh: Mesh | None, dtype: str, skip: int
) -> Part:
  """Reads an encoder of texts; CLIP says them `skip` blocks before its end."""
  changes: dict[str, Any] = {"dtype": dtype}
  if found.config.name == "clip":
    changes["skip"] = skip
  config = dataclasses.replace(found.config, **changes)
  module = text_encoders.MODULES[config.name]
  params = _encoder_params(found, config, module, mesh, dtype)
  run = jax.jit(functools.partial(module.apply, config))
  return Part(config, params, {"texts": run})


def image_encoder(folder: pathlib.Path, mesh: Mesh | None, dtype: str) -> Part:
  """Reads CLIP's encoder of images, which is shown them as it was trained."""
  found = text_encoders.open(folder)
  config = dataclasses.replace(found.config, dtype=dtype)
  params = _encoder_params(found, config, clip_vision, mesh, dtype)

  def embed(params, x_BHWC):
    shown_BHWC = clip_vision.shown(config, x_BHWC)
    return clip_vision.apply(config, params, shown_BHWC)

  return Part(config, params, {"embed": jax.jit(embed)})


def latent_coder(folder: pathlib.Path, mesh: Mesh | None, dtype: str) -> Part:
  """Reads an autoencoder, whose latents are shifted and scaled."""
  config, leaves = vae.find(folder)
  config = dataclasses.replace(config, dtype=dtype)
  abstract = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for path, leaf in leaves.items()
  }
  params = _placed(
    leaves.items(),
    tables.unflatten(abstract),
    ((".*", ()),),  # It is small: every device holds it whole.
    mesh,
    dtype,
  )

  def encode(params, x_BHWC):
    mean_BHWC, log_variance_BHWC = autoencoder.encode(config, params, x_BHWC)
    log_scale = 2.0 * np.log(config.scaling_factor)
    mean_BHWC = autoencoder.scaled(config, mean_BHWC)
    return mean_BHWC, log_variance_BHWC + log_scale

  def decode(params, z_BHWC):
    z_BHWC = autoencoder.unscaled(config, z_BHWC)
    return autoencoder.decode(config, params, z_BHWC)

  whole_image = jax.jit(decode)

  def decode_tiled(params, z_BHWC):
    tile = functools.partial(whole_image, params)
    return tiles.decode(config, tile, z_BHWC)

  run: dict[str, Any] = {
    "encode": jax.jit(encode),
    "decode": whole_image,
    "decode_tiled": decode_tiled,
  }
  return Part(config, params, run)


def on_rows(
  part: Part,
  what: str,
  rows: Any,
  mesh: Mesh | None,
  at_once: int | None = None,
) -> Any:
  """Returns what a part makes of rows [N, ...], on the host."""
  rows, run = np.asarray(rows), part.run[what]
  count = len(rows)
  size = min(at_once or count, count)
  context: Any = contextlib.nullcontext()
  put: Any = jnp.asarray
  if mesh is not None:
    context, put = meshes.use(mesh), placing.put_whole(mesh)
    size = meshes.padded(size, mesh)
  found = []
  with context:
    for start in range(0, count, size):
      # The last row fills up what the devices share evenly.
      kept_N = np.minimum(np.arange(start, start + size), count - 1)
      out = run(part.params, put(rows[kept_N]))
      found.append(jax.tree.map(placing.fetch, out))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)


def _encoder_params(
  found: text_encoders.Found, config: Any, module: Any, mesh: Any, dtype: str
) -> Any:
  abstract = jax.eval_shape(lambda: module.init(config, jax.random.key(0)))
  table = rules.for_model(config)
  return _placed(found.leaves(), abstract, table, mesh, dtype)


def _placed(
  leaves: Any, abstract: Any, table: rules.Rules, mesh: Mesh | None, dtype: str
) -> Any:
  """Returns the tree of leaves, over the mesh or on one device."""
  _, kind = safetensors.DTYPES[dtype]
  shapes = tables.flatten(abstract)
  if mesh is None:
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings: Any = dict.fromkeys(shapes, alone)
  else:
    shardings = tables.flatten(rules.shardings(table, abstract, mesh))
  places = {
    path: jax.ShapeDtypeStruct(leaf.shape, kind, sharding=shardings[path])
    for path, leaf in shapes.items()
  }
  return tables.unflatten(placing.put_leaves(leaves, places))
