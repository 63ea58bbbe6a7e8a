"""What a run leaves behind, and whose run it is.

A workdir holds `config.json`, `checkpoints/`, `metrics.jsonl`, TensorBoard
events, `samples/step_*.png`, `curves.png`, and what later commands add.
"""

import json
import logging
import os
import pathlib
from typing import Any

from flowjax import errors, schema
from flowjax.train import experiment

# Where and how a run computes may change between its restarts; what it
# computes may not.
FREE = ("mesh", "log", "checkpoint", "sample")
FREE_DATA = ("workers", "prefetch", "data_dir")


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one, whole."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(values, indent=2) + "\n")
  os.replace(partial, path)


def claim(
  workdir: pathlib.Path, config: experiment.Experiment, allow_change: bool
) -> None:
  """Makes the workdir that of `config`, or refuses with the difference.

  With `allow_change` an older config is kept beside the new one.
  """
  path, new = workdir / "config.json", schema.to_dict(config)
  if path.exists():
    old = json.loads(path.read_text())
    rows = schema.difference(_fixed(old), _fixed(new))
    if rows and not allow_change:
      raise errors.UserError(
        f"{workdir} was made with another config:\n  "
        + "\n  ".join(rows)
        + "\nChoose another --workdir, or say --allow_config_change to go on "
        "with the new one."
      )
    if rows:
      logging.warning("Going on with another config: %s", "; ".join(rows))
      number = len(list(workdir.glob("config.*.json")))
      os.replace(path, workdir / f"config.{number}.json")
  write_json(path, new)


def read_config(workdir: pathlib.Path) -> experiment.Experiment:
  """Returns the experiment of a workdir; data only, no code is run."""
  path = workdir / "config.json"
  if not path.exists():
    raise errors.UserError(
      f"{workdir} is no workdir of a run: it has no config.json. Train into it "
      "first, or correct --workdir."
    )
  try:
    return experiment.build(json.loads(path.read_text()))
  except json.JSONDecodeError as error:
    raise errors.UserError(f"{path} is not JSON: {error}") from error


def _fixed(values: dict) -> dict:
  """Returns the part of a config that must not change under a run."""
  kept = {key: value for key, value in values.items() if key not in FREE}
  kept["data"] = {
    key: value
    for key, value in kept.get("data", {}).items()
    if key not in FREE_DATA
  }
  return kept
