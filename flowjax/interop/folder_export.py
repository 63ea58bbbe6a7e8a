"""Exports for other people's code: diffusers, or that of a paper.

Under `flowjax.json`, which says what was exported and whose folder this is,
lie the weights, in one file or several; for diffusers a config.json, so that
`from_pretrained` takes the folder; and `label_embeddings.safetensors`, where a
network that reads texts has learned one for each label.
"""

import json
import pathlib
from typing import Any

import flowjax
from flowjax import errors, schema
from flowjax.interop import (
  diffusers_configs,
  files,
  formats,
  pipelines,
  safetensors,
  shards,
  tables,
)

MARKER = "flowjax.json"
STEMS = {"diffusers": "diffusion_pytorch_model", "original": "model"}


def export(
  params: dict,
  config: Any,
  out_dir: pathlib.Path,
  *,
  format: str,
  dtype: str = "float32",
  max_bytes: int | None = None,
  about: dict[str, Any] | None = None,
  scheduler: dict[str, Any] | None = None,
  pipeline: pathlib.Path | None = None,
) -> None:
  """Writes the weights of a network, all of it or nothing.

  The host holds one parameter at a time. `about` is what else the marker says.
  Only an earlier export in this format is replaced. For diffusers, a
  `scheduler` has a folder of its own; and with the folder of a `pipeline` the
  weights go into `transformer`, beside copies of its other parts.
  """
  if dtype not in safetensors.DTYPES:
    raise errors.UserError(
      f"Cannot export weights as {dtype!r}. "
      f"{schema.closest(dtype, safetensors.DTYPES)}"
    )
  table = formats.layout(config, format)
  index = pipelines.read(pipeline, config) if pipeline else {}
  if pipeline and scheduler and pipelines.same_scheduler(pipeline, scheduler):
    scheduler = None  # The pipeline's own is copied as it is.
  about = {"dtype": dtype, "model": schema.to_dict(config), **(about or {})}
  marker = files.export_folder(out_dir, format=name(format), marker=MARKER)
  with marker as new:
    own = new / pipelines.TRANSFORMER if pipeline else new
    own.mkdir(exist_ok=True)
    stem = STEMS[format]
    _write_weights(own / stem, params, table, config, dtype, max_bytes)
    if format == "diffusers":
      _write_json(own / "config.json", diffusers_configs.write(config))
    if pipeline:
      _write_marker(own, format, about)
    if scheduler:
      (new / pipelines.SCHEDULER).mkdir()
      path = new / pipelines.SCHEDULER / "scheduler_config.json"
      _write_json(path, scheduler)
    if pipeline:
      pipelines.write(new, pipeline, index)
    _write_marker(new, format, about)


def _write_weights(
  path: pathlib.Path,
  params: dict,
  table: tables.Table,
  config: Any,
  dtype: str,
  max_bytes: int | None,
) -> None:
  """Writes `path` and, beside it, the texts that are no part of a format."""
  labels = formats.labels_layout(config)
  rest = {key: value for key, value in params.items() if key != formats.LABELS}
  shards.write(
    path.parent,
    path.name,
    table.keys,
    table.to_theirs(params if labels is None else rest),
    dtype=dtype,
    max_bytes=max_bytes,
  )
  if labels is not None:
    safetensors.write(
      path.with_name(formats.LABELS_FILE),
      labels.keys,
      labels.to_theirs({formats.LABELS: params[formats.LABELS]}),
      dtype=dtype,
    )


def _write_marker(folder: pathlib.Path, format: str, about: dict) -> None:
  written = sorted(path.name for path in folder.iterdir())
  description = {
    "format": name(format),
    "flowjax": flowjax.__version__,
    **about,
    files.LISTED: [*written, MARKER],
  }
  _write_json(folder / MARKER, description)


def name(format: str) -> str:
  """Returns what the marker of a folder calls its format."""
  return f"flowjax-{format}"


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")
