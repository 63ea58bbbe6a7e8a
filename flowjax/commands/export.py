"""Writes the weights of a workdir for others.

  torch      a folder with model.py, which needs torch and safetensors alone
  diffusers  a folder for `from_pretrained` of the transformer's class
  original   the keys of the code that came with the paper
  lora       the adapters alone, for `load_lora_weights`

`flowjax import` reads each of them again. Of a run with adapters (config.lora)
the first three hold the weights with the adapters merged. Of a run that was
imported from a pipeline, diffusers gets the whole of it, the frozen parts as
they came. An autoencoder is for diffusers alone, with the scale that its
latents of training images have.

example:
  flowjax export --workdir=runs/digits --format=torch --out=exported --verify
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from flowjax import errors, models, schema
from flowjax.commands import flags, latents, pipeline, restored
from flowjax.interop import (
  diffusers_check,
  diffusers_configs,
  folder_export,
  formats,
  lora,
  pipelines,
  safetensors,
  torch_export,
)
from flowjax.parallel import placing
from flowjax.train import workdir

# What float32 allows between two libraries.
TOLERANCE = {"torch": 1e-5, "diffusers": 2e-5}


def add_flags(parser) -> None:
  """Adds the flags of `export`."""
  restored.add_run(parser)
  parser.add_argument(
    "--format",
    choices=(*formats.FORMATS, lora.FORMAT),
    default="torch",
    help="for whom",
  )
  parser.add_argument(
    "--out", type=flags.path, required=True, help="the folder to write"
  )
  parser.add_argument(
    "--dtype",
    choices=list(safetensors.DTYPES),
    default="float32",
    help="how the weights are stored",
  )
  parser.add_argument(
    "--max-shard-size",
    type=flags.size,
    help="divide larger weights into files of at most so much, such as 5GB",
  )
  parser.add_argument(
    "--pipeline",
    type=flags.path,
    help="a pipeline of diffusers, in a folder: the export is that pipeline, "
    "its other parts copied, with this transformer; default: that of the run",
  )
  parser.add_argument(
    "--verify",
    action="store_true",
    help="load the export in torch or diffusers and compare the outputs",
  )


def run(args) -> None:
  """Exports, verifies if asked, and says where everything is."""
  _check(args)
  found = restored.open(args.workdir, ema=args.ema)
  for reads, what in (
    (found.config.text.vocabulary, "captions"),
    (found.config.layout.classes, "layouts"),
    (found.config.embedding.size, "images"),
  ):
    if reads:
      raise errors.UserError(
        f"--workdir={args.workdir} reads {what} by an encoder that was trained "
        "with it, and no format has a place for that: export a run on embedded "
        "texts."
      )
  if args.format == lora.FORMAT:
    _export_lora(args, found)
    return
  formats.layout(found.config.model, args.format)
  if found.config.is_autoencoder and args.pipeline:
    raise errors.UserError(
      f"--pipeline={args.pipeline} is given another transformer, and this is "
      "the run of an autoencoder: leave it out, and put the folder in the "
      "place of the pipeline's vae/."
    )
  told = getattr(found.config.model, "context_channels", 0)
  if told and args.pipeline:
    raise errors.UserError(
      f"--pipeline={args.pipeline}: its class shows its transformer the image "
      f"alone, and this one reads {told} channels beside it. Leave it out: the "
      "export is the transformer, for a pipeline that makes these channels."
    )
  if args.format == "diffusers" and not args.pipeline and not told:
    args.pipeline = pipeline.folder(args.workdir, found.config)
  if args.pipeline:
    flow = schema.to_dict(found.config.flow)
    pipelines.require_steps(args.pipeline, flow)
  if args.verify and args.format == "diffusers":
    content = diffusers_configs.write(found.config.model)
    diffusers_check.require(content["_class_name"])
  report = read_report(found, ema=args.ema)
  params = found.network_params()
  if found.config.is_autoencoder:
    found = _scaled(args, found)

  def write(params: dict) -> None:
    if args.format == "torch":
      _export_torch(args, found, params, report)
    else:
      _export_folder(args, found, params)
    print(f"Weights of step {found.step} for {args.format}: {args.out}")
    if args.verify:
      difference = _verify(args, found, params)
      entries = {f"{args.format}_max_abs_diff": difference}
      entries = {**identity(found, ema=args.ema), **entries}
      workdir.write_json(args.workdir / "report.json", report | entries)

  placing.on_first(params, write)


def _check(args) -> None:
  """Refuses what cannot be done before anything is read."""
  if args.format == "torch" and args.max_shard_size:
    raise errors.UserError(
      "--max-shard-size: model.py of --format=torch reads one file. Leave it "
      "out, or choose another format."
    )
  if args.verify and args.format == "original":
    raise errors.UserError(
      "--verify compares with a library that runs the weights, and there is "
      "none for --format=original. Leave it out."
    )
  if args.pipeline and args.format != "diffusers":
    raise errors.UserError(
      f"--pipeline={args.pipeline} is one of diffusers: it needs "
      "--format=diffusers."
    )
  if args.format == lora.FORMAT and (args.verify or args.max_shard_size):
    raise errors.UserError(
      "--verify and --max-shard-size are for whole weights. With "
      "--format=diffusers --verify the adapters are compared, merged."
    )
  if args.verify:
    torch_export.require_torch()


def _export_torch(args, found: restored.Restored, params: dict, report: dict):
  card = {
    "config": schema.to_dict(found.config),
    "step": found.step,
    "weights": weights_name(args.ema),
    "scores": report,
  }
  torch_export.export(
    params,
    found.config.model,
    args.out,
    card=card,
    dtype=args.dtype,
    path=found.config.flow.path.name,
    prediction=found.config.flow.prediction,
  )


def _export_folder(args, found: restored.Restored, params: dict):
  config = schema.to_dict(found.config)
  scheduler = None
  if args.format == "diffusers" and not found.config.is_autoencoder:
    scheduler = pipelines.scheduler(config["flow"], config["sample"])
  folder_export.export(
    params,
    found.config.model,
    args.out,
    format=args.format,
    dtype=args.dtype,
    max_bytes=args.max_shard_size,
    about={
      "step": found.step,
      "weights": weights_name(args.ema),
      "flow": config["flow"],
      "sample": config["sample"],
    },
    scheduler=scheduler,
    pipeline=args.pipeline,
  )


def _scaled(args, found: restored.Restored) -> restored.Restored:
  """Returns the run of an autoencoder with the scale of its own latents.

  That of one which was imported, and not trained since, stays as it is.
  """
  model = found.config.model
  if not found.step:
    return found
  seen = latents.measure(found)
  changes: dict[str, float] = {"scaling_factor": 1.0 / seen.spread}
  if getattr(model, "shift_factor", None) is not None:
    changes["shift_factor"] = seen.mean
  print(
    f"Latents of {seen.images} training images: mean {seen.mean:.4g}, standard "
    f"deviation {seen.spread:.4g}. So {_listed(changes)}."
  )
  config = dataclasses.replace(
    found.config, model=dataclasses.replace(model, **changes)
  )
  run = dataclasses.replace(found.run, experiment=config)
  return dataclasses.replace(found, run=run)


def _listed(values: dict[str, float]) -> str:
  return ", ".join(f"{name} = {value:.5g}" for name, value in values.items())


def _export_lora(args, found: restored.Restored):
  if not found.config.lora.rank:
    raise errors.UserError(
      f"{args.workdir} has no adapters to export: it was trained with "
      "config.lora.rank=0. Choose another --format."
    )

  def write(params: dict) -> None:
    lora.export(
      params,
      found.config.model,
      found.config.lora,
      args.out,
      dtype=args.dtype,
      about={"step": found.step, "weights": weights_name(args.ema)},
    )

  placing.on_first(found.params, write)
  print(f"Adapters of step {found.step} for load_lora_weights: {args.out}")


def _verify(args, found: restored.Restored, params: dict) -> float:
  """Returns the difference of the outputs, unless it is too large."""
  if args.dtype != "float32":
    # What is compared is the code; that weights were rounded is known.
    _, dtype = safetensors.DTYPES[args.dtype]
    params = jax.tree.map(
      lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), params
    )
  network = models.build(found.config.model)
  if args.format == "torch":
    difference = torch_export.verify(args.out, network, params)
  else:
    folder = args.out / pipelines.TRANSFORMER if args.pipeline else args.out
    difference = diffusers_check.verify(
      folder, network, params, dtype=args.dtype
    )
  print(f"Largest difference between JAX and {args.format}: {difference:.2e}")
  # Written so that nan is refused too.
  if not difference <= TOLERANCE[args.format]:
    raise errors.UserError(
      f"The export in {args.out} differs from JAX by {difference:.2e}, more "
      f"than {TOLERANCE[args.format]}: it is not to be used."
    )
  return difference


def weights_name(ema: bool) -> str:
  """Returns what a report calls the weights that it is about."""
  return "averaged (EMA)" if ema else "raw"


def identity(found: restored.Restored, *, ema: bool) -> dict[str, Any]:
  """Returns the entries of a report that say which weights it is about."""
  return {
    "step": found.step,
    "weights": weights_name(ema),
    # Another run that came to the same step took another time.
    "train_seconds": round(found.extra["train_seconds"], 1),
  }


def read_report(found: restored.Restored, *, ema: bool) -> dict[str, Any]:
  """Returns what is reported of exactly these weights, if anything."""
  path = found.directory / "report.json"
  report = workdir.read_json(path) if path.exists() else {}
  ours = identity(found, ema=ema)
  return report if ours.items() <= report.items() else {}
