"""What a run leaves behind, and whose run it is.

A workdir holds `config.json`, `checkpoints/` and `checkpoints.json`,
`metrics.jsonl`, TensorBoard events, `samples/step_*.png`, `curves.png`, and
what later commands add.
"""

import hashlib
import json
import logging
import os
import pathlib
import tempfile
from typing import Any

import flowjax
from flowjax import errors, schema
from flowjax.train import experiment

# The entry of config.json that says who wrote it, and what.
SEAL = "flowjax"

# Where and how a run computes may change between its restarts; what it
# computes may not.
FREE = {
  "config": ("mesh", "log", "checkpoint", "sample", "pipeline"),
  "data": ("workers", "prefetch", "data_dir", "on_corrupt"),
  "model": ("attention", "remat", "scan"),
  "optim": ("offload",),
}


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one, whole."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(values, indent=2) + "\n")
  os.replace(partial, path)


def require_writable(path: pathlib.Path, flag: str) -> None:
  """Raises UserError where the file that a flag asks for cannot be written."""
  if path.is_dir():
    raise errors.UserError(f"{flag}={path} is a folder; name a file in it.")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    raise errors.UserError(
      f"{flag}={path}: the folder {path.parent} cannot be written "
      f"({error.strerror}). Choose another place, or make room there."
    ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a JSON file of a workdir holds."""
  try:
    values = json.loads(path.read_text())
  except ValueError as error:  # Not JSON, or not even text.
    values = error
  if not isinstance(values, dict):
    raise errors.UserError(
      f"{path} is damaged: {values}. Bring it back from a copy, or delete it "
      "and give the same `flowjax train` command again, which writes it anew."
    )
  return values


def require_no_other(workdir: pathlib.Path) -> None:
  """Refuses a folder whose config.json is of something else than a run.

  One that FlowJAX sealed is its own, whatever has become of its keys.
  """
  path = workdir / "config.json"
  if not path.exists():
    return
  values = read_json(path)
  if SEAL in values:
    return
  try:
    experiment.build(values)
  except errors.UserError as error:
    raise errors.UserError(
      f"--workdir={workdir} is the folder of something else: its config.json "
      f"is not that of a run ({error}). Choose another --workdir."
    ) from error


def changes(workdir: pathlib.Path, config: experiment.Experiment) -> list[str]:
  """Lists in what `config` differs from that which the workdir is for."""
  path = workdir / "config.json"
  if not path.exists():
    return []
  values = read_json(path)
  values.pop(SEAL, None)
  return difference(values, config)


def difference(
  saved: dict[str, Any], config: experiment.Experiment
) -> list[str]:
  """Lists where `config` would compute something else than a saved one.

  A key that is newer than the saved one has its default there: what it was
  before there was a choice.
  """
  try:
    saved = schema.to_dict(experiment.build(saved))
  except errors.UserError:
    pass  # The difference will say what is odd about it.
  return schema.difference(_fixed(saved), _fixed(schema.to_dict(config)))


def refuse_changes(workdir: pathlib.Path, rows: list[str]) -> None:
  """Refuses a config that is not the workdir's, with the difference."""
  if rows:
    raise errors.UserError(
      f"{workdir} was made with another config:\n  "
      + "\n  ".join(rows)
      + "\nChoose another --workdir, or say --allow_config_change to go on "
      "with the new one."
    )


def claim(workdir: pathlib.Path, config: experiment.Experiment) -> None:
  """Makes the workdir that of `config`; another config is kept beside it."""
  path, rows = workdir / "config.json", changes(workdir, config)
  if rows:
    number = len(list(workdir.glob("config.*.json")))
    os.replace(path, workdir / f"config.{number}.json")
    more = f"; and {len(rows) - 10} more" if len(rows) > 10 else ""
    logging.warning(
      "Going on with another config: %s%s. The earlier one is now "
      "config.%d.json.",
      "; ".join(rows[:10]), more, number,
    )  # fmt: skip
  values = schema.to_dict(config)
  seal = {"version": flowjax.__version__, "checksum": _checksum(values)}
  write_json(path, {SEAL: seal, **values})


def read_config(workdir: pathlib.Path) -> experiment.Experiment:
  """Returns the experiment of a workdir; data only, no code is run.

  What an earlier FlowJAX wrote lacks the keys that are newer, and these have
  their defaults. So that a key that was lost is not taken for one that is new,
  a file whose seal is broken must have them all.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise errors.UserError(
      f"{workdir} is no workdir of a run: it has no config.json. Correct "
      "--workdir, or train into it: `flowjax train` also writes a config.json "
      "that was lost."
    )
  values = read_json(path)
  seal = values.pop(SEAL, None)
  checksum = _checksum(values)
  try:
    config = experiment.build(values)
    sound = isinstance(seal, dict) and seal.get("checksum") == checksum
    if seal is not None and not sound:
      schema.require_all(config, values, "config")
    return config
  except errors.UserError as error:
    raise errors.UserError(
      f"{path} does not hold the config of a run: {error}"
    ) from error


def _checksum(values: dict[str, Any]) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _fixed(values: dict) -> dict:
  """Returns the part of a config that must not change under a run."""

  def without(group: dict, name: str) -> dict:
    return {key: item for key, item in group.items() if key not in FREE[name]}

  kept = without(values, "config")
  for name in ("data", "model", "optim"):
    kept[name] = without(kept.get(name, {}), name)
  return kept
