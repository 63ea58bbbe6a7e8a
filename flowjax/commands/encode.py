"""Encodes a source once, for all training on it: latents, embedded texts.

The images of config.data's source become the mean and log-variance of their
latents, and its captions embedded texts, by the frozen networks of
config.pipeline; without one, images and captions are stored as they are. They
lie in shards that `config.data.source=arrayrecord:DIR` reads in any order. Of
config only the groups `data` and `pipeline` matter. Started again after
whatever end, also with another number of processes, it writes what is missing.

example:
  flowjax encode --config=configs/sd3.py --out=data/latents \\
    --config.pipeline=models/sd3 --config.data.source=folder:data/photos \\
    --config.data.image_size='(512, 512)' --config.data.channels=3
  flowjax encode --verify --out=data/latents
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax

from flowjax import errors, schema
from flowjax.commands import configs, encode_plan, encoding, flags
from flowjax.data import (
  archive,
  archive_writing,
  arrayrecord,
  buckets,
  records,
  sources,
)
from flowjax.data import config as data_config
from flowjax.parallel import distributed
from flowjax.parallel import mesh as meshes
from flowjax.train import experiment, lock, loop, progress

DTYPES = (*records.FLOATS, "uint8")


def add_flags(parser) -> None:
  """Adds the flags of `encode`."""
  parser.add_argument("--config", help=configs.HELP)
  parser.add_argument(
    "--out", type=flags.path, required=True, help="the folder of the shards"
  )
  parser.add_argument(
    "--verify",
    action="store_true",
    help="encode nothing: look at every byte and record of the folder",
  )
  parser.add_argument(
    "--splits",
    default=",".join(sources.SPLITS),
    help="which splits of the source, with commas between them",
  )
  parser.add_argument(
    "--dtype",
    choices=DTYPES,
    help="how numbers are stored; default: float16, and uint8 for pixels",
  )
  parser.add_argument(
    "--shard_size",
    type=flags.size,
    default="1GB",
    help="about how long a shard is; a kill loses at most one a process",
  )
  parser.add_argument(
    "--batch_size",
    type=flags.count,
    default=32,
    help="how many images a process encodes at once",
  )
  parser.add_argument(
    "--compute_dtype",
    choices=("bfloat16", "float32"),
    default="bfloat16",
    help="in which the frozen networks compute",
  )


def run(args) -> None:
  """Encodes, or verifies, and says what there is."""
  if args.verify:
    verify(args.out)
    return
  if not args.config:
    raise errors.UserError("--config is missing: it names the source.")
  archive.library()
  data, pipeline = configs.data(args.config, args.overrides)
  # Captions are kept as they are, for whatever makes tokens of them.
  data = dataclasses.replace(data, tokenizer=None, words=(), originals=True)
  splits = _splits(args.splits, data)
  with lock.WorkdirLock(args.out, flag="--out"), loop.out_of_memory_advice():
    mesh = meshes.build(meshes.MeshConfig(data=1, fsdp=-1), jax.local_devices())
    batch_size = meshes.padded(args.batch_size, mesh)
    encoder = frozen(pipeline, mesh, args.compute_dtype) if pipeline else None
    works = [
      begin(
        folder,
        parts,
        encoder,
        config,
        dtype=args.dtype,
        shard_size=args.shard_size,
        batch_size=batch_size,
      )
      for folder, parts, config in by_bucket(args.out, splits, data)
    ]
    for work in works:
      print(summary(work.folder, encode(work)))


def by_bucket(
  folder: pathlib.Path,
  splits: dict[str, sources.Source],
  config: data_config.DataConfig,
) -> list[tuple[pathlib.Path, dict, data_config.DataConfig]]:
  """Returns what is encoded into which folder: each bucket has its own."""
  if not config.buckets:
    return [(folder, splits, config)]
  found = []
  for size in config.buckets:
    parts = {
      split: part
      for split, source in splits.items()
      for part in buckets.parts_of(source)
      if part.shape[:2] == size
    }
    if parts:
      alone = dataclasses.replace(config, image_size=size)
      found.append((folder / buckets.said(size), parts, alone))
  if distributed.is_first():
    names = [place.name for place, _, _ in found]
    archive_writing.begin_buckets(folder, names)
  return found


def begin(
  folder: pathlib.Path,
  splits: dict[str, sources.Source],
  encoder: encode_plan.Encoder | None,
  config: data_config.DataConfig,
  *,
  dtype: str | None,
  shard_size: int,
  batch_size: int,
) -> encoding.Work:
  """Plans the folder, or finds that it is planned so already.

  Raises UserError for one that holds something else.
  """
  plan = encode_plan.plan(
    splits,
    encoder,
    config,
    dtype=dtype,
    shard_size=shard_size,
    batch_size=batch_size,
  )
  distributed.agree("records", plan.to_json())
  if distributed.is_first():
    archive_writing.begin(folder, plan)
    part = encode_plan.empty(plan, encoder, batch_size)
    if part is not None:
      archive_writing.write_empty(folder, part)
  return encoding.Work(
    folder, splits, plan, encoder, batch_size, config.on_corrupt
  )


def encode(work: encoding.Work) -> archive.Index:
  """Writes the shards that are missing, each process its own, and the index."""
  distributed.meet()
  missing = archive_writing.missing(work.folder, work.plan)
  # Nobody writes before all have looked.
  distributed.agree("missing shards", {"count": len(missing)})
  mine = missing[jax.process_index() :: jax.process_count()]
  if mine and len(missing) < len(work.plan.shards()):
    logging.info(
      "%d of %d shards are there.",
      len(work.plan.shards()) - len(missing), len(work.plan.shards()),
    )  # fmt: skip
  total = sum(len(work.plan.numbers(*key)) for key in mine)
  if total:
    with progress.counter("records", total) as done:
      work.write(mine, done)
  distributed.meet()
  if distributed.is_first():
    archive_writing.finish(work.folder, work.plan)
  distributed.meet()
  return archive.read(work.folder)


def verify(folder: pathlib.Path) -> None:
  """Looks at every shard; raises DataError that names what is wrong."""
  if not folder.is_dir():
    raise errors.DataError(f"There is no folder {folder}: correct --out.")
  for part in archive.folders(folder):
    _verify(part)


def _verify(folder: pathlib.Path) -> None:
  index = archive.read(folder)
  keys = index.plan.shards()
  mine = keys[jax.process_index() :: jax.process_count()]
  found = archive_writing.problems_of_folder(folder, index)
  with progress.counter("shards", max(1, len(mine))) as done:
    for count, key in enumerate(mine, 1):
      found += archive_writing.problems(folder, index, *key)
      done(count)
  if found:
    raise errors.DataError(
      f"{len(found)} files of {folder} are wrong:\n  "
      + "\n  ".join(found[:20])
      + "\nBring them back from a copy, or remove them and give the same "
      "`flowjax encode` again, which writes what is missing."
    )
  print(f"{summary(folder, index)} Every byte is as it was written.")


def summary(folder: pathlib.Path, index: archive.Index) -> str:
  """Says what a folder holds, and what its source had and it has not."""
  about = index.to_json()
  lines = []
  for split, count in about["records"].items():
    total = sum(shard.bytes for shard in index.shards[split])
    lines.append(
      f"{split}: {count:,} records in {len(index.shards[split])} shards of "
      f"{total / 1e6:,.1f} MB."
    )
  if about["failed"]:
    lines.append(
      f"{about['failed']} records failed; {folder / archive.INDEX} names them."
    )
  return " ".join([f"{folder}:", *lines])


def frozen(
  folder: str, mesh: Any = None, dtype: str = "bfloat16"
) -> encode_plan.Encoder:
  """Opens the frozen networks of a pipeline, of which nothing is read yet."""
  from flowjax.interop import frozen as pipelines

  return pipelines.open(folder, mesh=mesh, dtype=dtype)


def refuse_others(
  config: experiment.Experiment, directory: pathlib.Path
) -> None:
  """Refuses latents that other networks made than those of config.pipeline."""
  encoded = arrayrecord.of(config.data)
  if encoded is None or config.pipeline is None or not encoded.about["frozen"]:
    return
  from flowjax.commands import pipeline

  found = frozen(str(pipeline.folder(directory, config))).fingerprint()
  made, here = ({**f, "dtype": None} for f in (encoded.about["frozen"], found))
  if rows := schema.difference(made, here, "frozen"):
    raise errors.DataError(
      f"{encoded.folder} was encoded by other networks than those of "
      f"config.pipeline = {config.pipeline!r}, or to another scale:\n  "
      + "\n  ".join(rows)
      + "\n(records -> pipeline). Name the pipeline that encoded them, or "
      "encode them again."
    )


def _splits(
  names: str, config: data_config.DataConfig
) -> dict[str, sources.Source]:
  found: dict[str, sources.Source] = {}
  for name in names.split(","):
    if name not in sources.SPLITS:
      raise errors.UserError(
        f"--splits={names} must be of {', '.join(sources.SPLITS)}."
      )
    try:
      found[name] = sources.open(config, name)
    except errors.UserError as error:
      if name == "held_out":
        raise type(error)(
          f"{error} Or leave it out: --splits=train."
        ) from error
      raise
  return found
