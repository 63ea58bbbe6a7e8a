"""Runs side by side in one picture: samples, losses, distance against cost."""

# Shape suffixes: N images, H height, W width, C channels, T times.

import collections.abc
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from flowjax.evaluate import pictures

COLOURS = (
  "#2563a8", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#0f9aa8", "#8c564b",
  "#6b7280", "#c2398e", "#4d7c0f",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """What is compared of one run.

  `error` is the squared error of the data that the network sees in x_t, at each
  of `log_snr`; where `evaluations` is the number of evaluations of the network
  for one sample, `frechet` is the distance reached with them. Either may be
  empty.
  """

  name: str
  samples_NHWC: np.ndarray
  log_snr: collections.abc.Sequence[float] = ()
  error: collections.abc.Sequence[float] = ()
  evaluations: collections.abc.Sequence[int] = ()
  frechet: collections.abc.Sequence[float] = ()


def draw(
  runs: collections.abc.Sequence[Run],
  out_png: pathlib.Path,
  *,
  frechet_real: float | None = None,
  style: Any = None,
) -> None:
  """Draws a column of samples, and beside it the curves of all runs."""
  import matplotlib
  from matplotlib import layout_engine
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  with matplotlib.rc_context(style or {}):
    height = max(4.6, 0.72 * len(runs) + 0.6)
    figure = Figure(
      figsize=(14.0, height),
      layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.04),
    )
    backend_agg.FigureCanvasAgg(figure)
    cells = figure.add_gridspec(
      len(runs), 3, width_ratios=(1.15, 1.0, 1.0), wspace=0.04
    )
    for row, run in enumerate(runs):
      _samples(figure.add_subplot(cells[row, 0]), run, _colour(row))
    _errors(figure.add_subplot(cells[:, 1]), runs)
    _frechet(figure.add_subplot(cells[:, 2]), runs, frechet_real)
    temporary = out_png.with_name(f".{out_png.name}.{os.getpid()}.tmp")
    figure.savefig(
      temporary, dpi=140, format="png", metadata=dict([pictures.MADE])
    )
  os.replace(temporary, out_png)


def table(
  runs: collections.abc.Sequence[Run], frechet_real: float | None
) -> str:
  """Returns the Fréchet distances as a table in Markdown."""
  counts = sorted({count for run in runs for count in run.evaluations})
  rows = [
    ["evaluations", *map(str, counts)],
    ["---", *["---:"] * len(counts)],
  ]
  for run in runs:
    found = dict(zip(run.evaluations, run.frechet, strict=True))
    rows.append(
      [run.name, *(f"{found[n]:.2f}" if n in found else "" for n in counts)]
    )
  text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
  if frechet_real is not None:
    text += f"\n\nReal images among themselves: {frechet_real:.2f}."
  return text


def _samples(axes, run: Run, colour: str) -> None:
  columns = 16
  sheet_HWC = pictures.grid(run.samples_NHWC[: 2 * columns], columns=columns)
  axes.imshow(sheet_HWC)
  axes.set_title(run.name, color=colour, pad=3, fontsize=9.5)
  axes.set_axis_off()


def _errors(axes, runs: collections.abc.Sequence[Run]) -> None:
  axes.set_title("Error of the data seen in $x_t$")
  for row, run in enumerate(runs):
    if len(run.error):
      axes.plot(
        run.log_snr, run.error, "o-", ms=3, lw=1.4, color=_colour(row),
        label=run.name,
      )  # fmt: skip
  axes.set_xlabel(r"log-SNR, from noise to data")
  axes.set_yscale("log")
  if axes.lines:
    axes.legend(fontsize=8)


def _frechet(
  axes, runs: collections.abc.Sequence[Run], real: float | None
) -> None:
  axes.set_title("Fréchet distance")
  for row, run in enumerate(runs):
    if len(run.frechet):
      axes.plot(
        run.evaluations, run.frechet, "o-", ms=3.5, lw=1.4, color=_colour(row),
        label=run.name,
      )  # fmt: skip
  if real is not None:
    axes.axhline(real, color="#9aa0a8", ls="--", lw=1.2, label="real images")
  axes.set_xlabel("evaluations of the network per sample")
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  if axes.lines:
    axes.legend(fontsize=8)


def _colour(row: int) -> str:
  return COLOURS[row % len(COLOURS)]
