"""TensorBoard event files, written through tensorboardX, without tensorflow.

Only the synchronous half of tensorboardX is used: its SummaryWriter hands
events to a thread, and once a full disk has ended that thread, the queue fills
and the next write waits for ever.
"""

import collections.abc
import json
import pathlib
import time

import numpy as np

FLUSH_SECONDS = 30.0


class TensorBoard:
  """Writes one event file; any method may raise OSError."""

  def __init__(self, directory: pathlib.Path, resume_step: int | None = None):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._summary, self._events = summary, event_pb2
    directory.mkdir(parents=True, exist_ok=True)
    self._file = event_file_writer.EventsWriter(
      str(directory / "events"), filename_suffix=f".{time.time_ns()}"
    )
    self._flushed = time.monotonic()
    if resume_step is not None:
      # Tells TensorBoard to hide what earlier files hold of later steps.
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(resume_step + 1, session_log=start)

  def write_scalars(self, step: int, scalars: collections.abc.Mapping) -> None:
    for name, value in scalars.items():
      self._write(step, self._summary.scalar(name, float(value)))

  def write_images(self, step: int, images: collections.abc.Mapping) -> None:
    for name, image_NHWC in images.items():
      for i, image_HWC in enumerate(np.asarray(image_NHWC)):
        tag = name if len(image_NHWC) == 1 else f"{name}/{i}"
        picture = self._summary.image(tag, image_HWC, dataformats="HWC")
        self._write(step, picture)

  def write_texts(self, step: int, texts: collections.abc.Mapping) -> None:
    for name, value in texts.items():
      self._write(step, self._summary.text(name, value))

  def write_hparams(self, hparams: collections.abc.Mapping) -> None:
    # As a text: the plugin for hparams knows no groups and no sequences.
    listing = json.dumps(hparams, indent=2, default=str)
    self._write(0, self._summary.text("hparams", f"```\n{listing}\n```"))

  def flush(self) -> None:
    self._flushed = time.monotonic()
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, step: int, summary) -> None:
    self._add(step, summary=summary)
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def _add(self, step: int, **content) -> None:
    event = self._events.Event(wall_time=time.time(), step=int(step), **content)
    self._file.write_event(event)
