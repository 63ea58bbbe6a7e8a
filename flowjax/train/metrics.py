"""Where the numbers of a run go: a JSON-lines file always, TensorBoard beside.

`Writer` has those methods of clu's MetricWriter that training needs, with its
signatures: write_scalars, write_images, write_texts, write_hparams, flush and
close; and none for summaries, histograms, audio, video or point clouds. A
backend that fails is dropped with one warning: no log is worth a run.
"""

import collections
import collections.abc
import importlib.util
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from flowjax import errors
from flowjax.train import json_lines, tensorboard

Scalars = collections.abc.Mapping[str, Any]
BACKENDS = ("tensorboardX", "clu")


class Writer:
  """Writes metrics, images, texts and hparams of a run into `directory`.

  Only process 0 writes. On a resume, lines after `resume_step` are dropped, so
  that no step is there twice; 0 begins anew and None keeps every line.
  backend="clu" writes TensorBoard through clu.metric_writers, which needs
  tensorflow and tensorboard.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    tensorboard: bool = True,
    backend: str = "tensorboardX",
    resume_step: int | None = None,
    process_index: int | None = None,
  ):
    directory = pathlib.Path(directory)
    process = jax.process_index() if process_index is None else process_index
    self._resume_step = resume_step
    self._lines: json_lines.JsonLines | None = None
    self._backend: Any = None
    self._name = backend
    if backend not in BACKENDS:
      raise errors.UserError(
        f"The metrics backend {backend!r} is not one of {BACKENDS}."
      )
    if tensorboard and backend == "clu":
      _check_clu()
    if process != 0:
      return
    self._lines = _open_lines(directory / "metrics.jsonl", resume_step)
    if tensorboard:
      self._open(backend, directory)

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Writes one line of numbers."""
    if self._lines:
      self._lines.write(step, scalars)
    self._try("write_scalars", step, scalars)

  def write_images(
    self, step: int, images: collections.abc.Mapping[str, np.ndarray]
  ) -> None:
    """Shows images, uint8 [N, H, W, C], where the backend can show them."""
    self._try("write_images", step, images)

  def write_texts(
    self, step: int, texts: collections.abc.Mapping[str, str]
  ) -> None:
    """Writes one line of texts."""
    if self._lines:
      self._lines.write(step, texts)
    self._try("write_texts", step, texts)

  def write_hparams(self, hparams: collections.abc.Mapping[str, Any]) -> None:
    """Writes the hparams, at the step from which the run goes on."""
    if self._lines:
      self._lines.write(self._resume_step or 0, {"hparams": hparams})
    clu = self._name == "clu"
    self._try("write_hparams", flat_hparams(hparams) if clu else hparams)

  def flush(self) -> None:
    """Hands everything to the operating system."""
    if self._lines:
      self._lines.flush()
    self._try("flush")

  def close(self) -> None:
    """Closes the files; the writer cannot be used afterwards."""
    self._try("close")
    self._backend = None
    if self._lines:
      self._lines.close()
      self._lines = None

  def _open(self, backend: str, directory: pathlib.Path) -> None:
    if backend == "tensorboardX" and not _is_installed("tensorboardX"):
      logging.warning(
        "No TensorBoard events are written: pip install tensorboardX. All "
        "metrics are in %s.",
        directory / "metrics.jsonl",
      )
      return
    try:
      if backend == "clu":
        from clu import metric_writers

        self._backend = metric_writers.create_default_writer(str(directory))
      else:
        folder = directory / "tensorboard"
        self._backend = tensorboard.TensorBoard(folder, self._resume_step)
    except Exception as error:
      self._give_up(error)

  def _try(self, method: str, *arguments) -> None:
    if self._backend is None:
      return
    try:
      getattr(self._backend, method)(*arguments)
    except Exception as error:  # Whatever it is, the run is worth more.
      self._give_up(error)

  def _give_up(self, error: Exception) -> None:
    self._backend = None
    logging.warning(
      "TensorBoard events stop here: the backend %s raised %s: %s. Training "
      "goes on, and all metrics are in metrics.jsonl.",
      self._name,
      type(error).__name__,
      error,
    )


def flat_hparams(
  hparams: collections.abc.Mapping[str, Any],
) -> dict[str, bool | int | float | str]:
  """Returns hparams as TensorBoard takes them: `model.depth`, and no tuples."""
  flat: dict[str, Any] = {}
  for name, value in hparams.items():
    if isinstance(value, collections.abc.Mapping):
      inner = flat_hparams(value)
      flat |= {f"{name}.{key}": item for key, item in inner.items()}
    else:
      plain = isinstance(value, (bool, int, float, str))
      flat[name] = value if plain else str(value)
  return flat


class Behind:
  """Holds metrics back until the device is `lag` steps further.

  A value is fetched only when a later step is already at work, so that the
  device never waits for the host.
  """

  def __init__(self, lag: int = 1):
    self._lag = lag
    self._queue: collections.deque = collections.deque()

  def push(self, step: int, values: Scalars) -> None:
    """Takes the metrics of `step`, as the device will have them."""
    for value in jax.tree.leaves(values):
      if isinstance(value, jax.Array):
        value.copy_to_host_async()
    self._queue.append((step, values))

  def ready(self) -> list[tuple[int, dict[str, Any]]]:
    """Returns steps that are `lag` behind, with their metrics as floats."""
    count = len(self._queue) - self._lag
    return [self._fetch() for _ in range(count)]

  def rest(self) -> list[tuple[int, dict[str, Any]]]:
    """Returns all that is left, waiting for the last step."""
    return [self._fetch() for _ in range(len(self._queue))]

  def _fetch(self) -> tuple[int, dict[str, Any]]:
    step, values = self._queue.popleft()
    fetched = jax.device_get(values)
    return step, {
      name: float(value) if np.ndim(value) == 0 else value
      for name, value in fetched.items()
    }


def _open_lines(path, resume_step) -> json_lines.JsonLines:
  try:
    return json_lines.JsonLines(path, resume_step)
  except OSError as error:
    raise errors.UserError(
      f"{path} cannot be written: {error}. Free the disk, or choose another "
      "workdir."
    ) from error


def _check_clu() -> None:
  missing = [
    name
    for name in ("clu", "tensorflow", "tensorboard")
    if not _is_installed(name)
  ]
  if missing:
    raise errors.UserError(
      "The metrics backend 'clu' needs clu, tensorflow and tensorboard, and "
      f"{' and '.join(missing)} is not installed: pip install 'flowjax[clu]', "
      "or take the backend 'tensorboardX', which needs none of them."
    )


def _is_installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None
