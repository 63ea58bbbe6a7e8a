"""Makes a workdir of weights from elsewhere, to train on, sample or export.

Reads a folder of diffusers (a transformer's, or a whole pipeline's), an export
of FlowJAX, the workdir of another run, or a safetensors file with the keys of
the paper's own code; sharded or not. What the network is comes from the
folder's config.json; for a file, and for all else, from --config.

Of a pipeline of SD3 or FLUX the autoencoder, the text encoders, their
tokenizers and the scheduler are kept in the workdir as they are, and
`flowjax sample --prompt` draws with them. How the pipeline samples by itself
becomes config.sample, unless there is a --config.

A network that sees the image alone begins one that is shown more beside it, for
a task, and says at first what it said: --config.task.name=inpainting
--config.model.context_channels=17 for latents of 16 channels.

example:
  flowjax import --from=exported --workdir=runs/imported \\
    --config.data.source=folder:/data/latents
"""

import collections.abc
import dataclasses
import itertools
import logging
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from flowjax import errors, models, schema
from flowjax.commands import configs, flags, pipeline, restored
from flowjax.data import config as data_config
from flowjax.interop import lazy, lora, tables, weights
from flowjax.models import patches
from flowjax.parallel import placing
from flowjax.train import begin, experiment, manifest, parts

SHOWN_EVERY = 5.0  # Seconds.
EMBED = "patch_embed/kernel"


def add_flags(parser) -> None:
  """Adds the flags of `import`."""
  parser.add_argument(
    "--from",
    dest="source",
    type=flags.path,
    required=True,
    help="the folder or file with the weights, or the workdir of a run",
  )
  parser.add_argument(
    "--workdir", type=flags.path, required=True, help="the folder to make"
  )
  parser.add_argument(
    "--lora",
    type=flags.path,
    help="adapters for these weights, as diffusers and PEFT save them",
  )
  parser.add_argument("--config", help=configs.HELP)


def run(args) -> None:
  """Reads, places, saves, and says what was read."""
  begin.require_new(args.workdir)
  found = _open(args)
  config = _config(args, found)
  config = pipeline.named(config, args.source)
  paths, leaves = _leaves_of(found, config.model)
  if args.lora:
    config, factors = _with_adapters(config, args.lora)
    paths = [*paths, *factors]
    leaves = itertools.chain(leaves, _leaves(factors))
  built = parts.build(config)
  named = manifest.named_leaves(built.abstract.params)
  _require_places(built, set(paths) - named.keys())
  published = manifest.named_leaves(built.published())
  fresh = sorted(named.keys() - set(paths) - published.keys())
  placed = begin.place(built, _shown(leaves, len(paths)))
  if fresh:
    placed |= begin.draw(built, fresh)
  kept = pipeline.keep(config, args.source, args.workdir)
  placed |= published
  begin.save(built, placed, args.workdir)
  for line in [*_summary(found, built, fresh), *kept]:
    print(line)
  print(f"Step 0 of a run in {args.workdir}. {_to_train_on(args, config)}")


def _to_train_on(args, config: experiment.Experiment) -> str:
  """Returns how to train on, also where no one has said yet of what."""
  saved = args.workdir / "config.json"
  line = f"  flowjax train --config={saved} --workdir={args.workdir}"
  data, default = config.data, data_config.DataConfig()
  size = (*data.image_size, data.channels)
  suits = args.config and size == (*default.image_size, default.channels)
  if data.source != default.source or suits:
    return f"To train on:\n{line}"
  return (
    "To train on, with a SOURCE such as folder:/data/images:\n"
    f"{line} --config.data.source=SOURCE --allow_config_change"
  )


def _leaves_of(
  found: weights.Weights, model: Any
) -> tuple[list[str], lazy.Leaves]:
  """Returns the leaves of a network, also where it is shown more than theirs.

  What goes in beside the image is then multiplied by zeros.
  """
  own, more = found.config(model), getattr(model, "context_channels", 0)
  if not more or own.context_channels:
    return found.leaves(model)
  paths, leaves = found.leaves(dataclasses.replace(model, context_channels=0))

  def widened():
    for path, leaf in leaves:
      if path == EMBED:
        kernel_PD = np.asarray(leaf)
        kernel_PD = patches.with_context(kernel_PD, model.patch_size, more)
        leaf = lazy.whole(np.asarray(kernel_PD))
      yield path, leaf

  return paths, widened()


def _require_places(built: parts.Parts, without: set[str]) -> None:
  """Refuses parameters for which the run that is to begin has no place."""
  if without:
    decay = built.experiment.reconstruction.codebook_decay
    raise errors.UserError(
      f"{', '.join(sorted(without))}: config.reconstruction.codebook_decay = "
      f"{decay} makes a codebook of averages, which are not in these weights. "
      "Leave it out: an imported codebook is trained by its loss."
    )


class _Run(weights.Weights):
  """The averaged weights of a run of ours, with its adapters merged."""

  def leaves(self, config: Any) -> tuple[list[str], lazy.Leaves]:
    abstract = jax.eval_shape(models.build(config).init, jax.random.key(0))
    shapes = {p: leaf.shape for p, leaf in tables.flatten(abstract).items()}
    if shapes != {path: leaf.shape for path, leaf in self.tensors.items()}:
      raise errors.UserError(
        f"{self.path} is a run of another network than config.model. Leave out "
        "--config, or what it changes of the model."
      )
    return list(shapes), _leaves(self.tensors)


def _leaves(arrays: collections.abc.Mapping[str, Any]) -> lazy.Leaves:
  """Yields arrays that are leaves of ours as they are."""
  for path, array in arrays.items():
    yield path, lazy.whole(placing.fetch(array))


def _open(args) -> weights.Weights:
  """Opens what --from names; a run of ours brings its config with it."""
  if not (args.source / "checkpoints").is_dir():
    return weights.open(args.source)
  run = restored.open(args.source)
  args.config = args.config or str(args.source / "config.json")
  params = run.network_params()
  model = schema.to_dict(run.config.model)
  return _Run(
    args.source, tables.flatten(params), {}, description={"model": model}
  )


def _with_adapters(
  config: experiment.Experiment, path: pathlib.Path
) -> tuple[experiment.Experiment, dict[str, Any]]:
  """Returns the config with the adapters of a file, and their leaves."""
  if config.lora.rank:
    raise errors.UserError(
      f"config.lora.rank = {config.lora.rank}: what --lora={path} holds says "
      "rank, alpha and targets. Leave config.lora as it is by default."
    )
  read = lora.read(path, config.model)
  return dataclasses.replace(config, lora=read.config), read.leaves


def _config(args, found: weights.Weights) -> experiment.Experiment:
  """Returns --config with the network that the weights are of."""
  if args.config is None and found.network is None:
    raise errors.UserError(
      f"{found.path} does not say what network it is of: name a --config whose "
      "model it is."
    )
  if args.config is None:
    start = experiment.defaults(str(found.network))
    model = found.config()
    _fill(start.flow, _flow(found), "flow")
    _fill(start.sample, pipeline.sampling(args.source, model), "sample")
    _fill(start.sample, found.description.get("sample", {}), "sample")
  else:
    start = configs.start(args.config)
    model = found.config(_model(start, found))
  if model is not None:
    _fill(start.model, schema.to_dict(model), "model")
  start.data.image_size = start.model.image_size
  start.data.channels = start.model.channels
  return configs.overridden(start, args.overrides, f"--from={args.source}")


def _model(start: ml_collections.ConfigDict, found: weights.Weights) -> Any:
  """Returns the model of --config, which must be of the weights' kind."""
  name = start.model.name
  if found.network not in (None, name):
    raise errors.UserError(
      f"config.model.name = {name!r}, and {found.path} holds a "
      f"{found.network!r}: name a --config of that kind, or none."
    )
  return schema.build(
    models.CONFIGS[name], start.model.to_dict(), "config.model"
  )


def _flow(found: weights.Weights) -> dict[str, Any]:
  """Returns what is known of the flow that the weights were trained for."""
  flow = found.description.get("flow", {})
  if isinstance(flow.get("path"), str):  # An export for torch has its name.
    flow = {**flow, "path": {"name": flow["path"]}}
  return flow


def _fill(node: ml_collections.ConfigDict, values: dict, where: str) -> None:
  """Sets the keys of a group that `values` have."""
  for key, value in values.items():
    if key not in node:
      raise errors.UserError(
        f"Unknown key {where}.{key}: an export of another version of FlowJAX? "
        f"{schema.closest(key, node.keys())}"
      )
    group = isinstance(node[key], ml_collections.ConfigDict)
    try:
      if group and isinstance(value, dict):
        _fill(node[key], value, f"{where}.{key}")
      else:
        node[key] = _tuples(value)
    except TypeError as error:
      raise errors.CheckpointError(
        f"{where}.{key} = {value!r} is of the wrong type: what lies with the "
        "weights is damaged. Export, or copy, the folder again."
      ) from error


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _shown(leaves: lazy.Leaves, count: int) -> lazy.Leaves:
  """Yields the leaves, and says now and then how far they are."""
  shown = time.monotonic()
  for done, (path, leaf) in enumerate(leaves):
    yield path, leaf
    if time.monotonic() - shown > SHOWN_EVERY:
      shown = time.monotonic()
      logging.info("%d of %d parameters: %s", done + 1, count, path)


def _summary(
  found: weights.Weights, built: parts.Parts, fresh: list[str]
) -> list[str]:
  """Says what was read, what was drawn anew, and what was left."""
  lines = [
    f"{found.path}: {len(found.tensors)} tensors, {found.bytes / 1e6:,.1f} MB; "
    f"{built.parameters:,} parameters."
  ]
  if fresh:
    lines.append(f"Not in it, and drawn anew: {', '.join(fresh)}.")
  if found.left:
    rest = ", ".join(f"{name} ({n})" for name, n in found.left.items())
    lines.append(f"Left, as no part of the transformer: {rest}.")
  return lines
