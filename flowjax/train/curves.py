"""The curves of a run as one picture, drawn from its metrics."""

import collections.abc
import os
import pathlib
from typing import Any

import numpy as np

from flowjax.train import json_lines

Rows = collections.abc.Sequence[dict[str, Any]]

BLUE, RED = "#2563a8", "#d1495b"
STYLE: Any = {
  "figure.facecolor": "white",
  "font.size": 9.5,
  "axes.titlesize": 11,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.titlepad": 10,
  "axes.edgecolor": "#9aa0a8",
  "axes.labelcolor": "#4b5563",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#e5e7eb",
  "grid.linewidth": 0.8,
  "axes.axisbelow": True,
  "xtick.color": "#4b5563",
  "ytick.color": "#4b5563",
  "legend.frameon": False,
}


def draw(metrics_jsonl: pathlib.Path, out_png: pathlib.Path) -> bool:
  """Draws loss, loss by time, learning rate and gradient norm.

  A panel without metrics is left out; returns whether there was any.
  """
  if not pathlib.Path(metrics_jsonl).exists():
    return False
  rows = json_lines.read(pathlib.Path(metrics_jsonl))
  panels = [panel for name, panel in PANELS if _is_there(rows, name)]
  if not panels:
    return False
  # Without pyplot: no window system, and no state that others might share.
  import matplotlib
  from matplotlib import layout_engine
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  last = max(row["step"] for row in rows)
  columns = min(2, len(panels))
  lines = -(-len(panels) // columns)
  with matplotlib.rc_context(STYLE):
    figure = Figure(
      figsize=(5.6 * columns, 3.5 * lines),
      layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    backend_agg.FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
      axes = figure.add_subplot(lines, columns, i + 1)
      panel(axes, rows)
      _steps_below(axes, last)
    out_png = pathlib.Path(out_png)
    temporary = out_png.with_name(f".{out_png.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
  os.replace(temporary, out_png)
  return True


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and values of a metric; null is not a number."""
  pairs = [(row["step"], row[name]) for row in rows if name in row]
  steps = np.array([step for step, _ in pairs], np.int64)
  values = [np.nan if value is None else value for _, value in pairs]
  return steps, np.array(values, np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
  """Averages each value with its neighbours, a fiftieth of all on each side.

  Twice, so that one outlier makes a hill and no step. Near the first, with as
  many before as after it, so that a steep beginning stays steep. What is not a
  number counts for nothing.
  """
  count = len(values)
  i = np.arange(count)
  half = np.minimum(i, count // 50)
  low, high = i - half, np.minimum(i + half + 1, count)
  for _ in range(2):
    finite = np.isfinite(values)
    total = np.cumsum(np.pad(np.where(finite, values, 0.0), (1, 0)))
    weight = np.cumsum(np.pad(finite, (1, 0)))
    with np.errstate(invalid="ignore", divide="ignore"):
      values = (total[high] - total[low]) / (weight[high] - weight[low])
  return values


def _is_there(rows: Rows, name: str) -> bool:
  return bool(np.isfinite(series(rows, name)[1]).any())


def _loss(axes, rows: Rows) -> None:
  axes.set_title("Loss")
  _raw_and_smoothed(axes, rows, "loss", "training")
  steps, values = series(rows, "validation_loss")
  if len(steps):
    label = f"validation, at fixed times  {_last(values):.4g}"
    axes.plot(steps, values, "o-", color=RED, ms=3, lw=1.4, label=label)
  _log_if_wide(axes)
  axes.legend(loc="upper right")


def _by_time(axes, rows: Rows) -> None:
  """Draws the validation loss at each of its times, from data to noise."""
  import matplotlib

  names = [f"validation_loss_t{i}" for i in range(64)]
  names = [name for name in names if _is_there(rows, name)]
  colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(names)))
  axes.set_title("Validation loss by time")
  for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
    steps, values = series(rows, name)
    label = f"t = {(i + 0.5) / len(names):.2f}   {_last(values):.3g}"
    axes.plot(steps, values, "o-", color=colour, ms=2.5, lw=1.4, label=label)
  _log_if_wide(axes)
  # Beside the curves, the highest first, as they end.
  handles, labels = axes.get_legend_handles_labels()
  order = np.argsort([-_last(handle.get_ydata()) for handle in handles])
  axes.legend(
    [handles[i] for i in order],
    [labels[i] for i in order],
    loc="center left",
    bbox_to_anchor=(1.0, 0.5),
    handlelength=1.2,
    fontsize=8.5,
  )


def _learning_rate(axes, rows: Rows) -> None:
  steps, values = series(rows, "learning_rate")
  axes.set_title("Learning rate")
  axes.plot(steps, values, _dot_if_alone(steps), color=BLUE, lw=1.8)
  axes.set_ylim(0.0, 1.1 * np.nanmax(values) or 1.0)
  axes.yaxis.set_major_formatter(_plain_number)


def _gradient(axes, rows: Rows) -> None:
  axes.set_title("Gradient norm")
  _raw_and_smoothed(axes, rows, "grad_norm", "before clipping")
  _log_if_wide(axes)
  axes.legend(loc="upper right")


def _raw_and_smoothed(axes, rows: Rows, name: str, label: str) -> None:
  """Draws a metric faintly, without its rare outliers, and its average."""
  steps, values = series(rows, name)
  smooth = smoothed(values)
  label = f"{label}  {_last(smooth):.4g}"
  low, high = np.percentile(values[np.isfinite(values)], (0.5, 99.5))
  shown = np.clip(values, low, max(high, np.nanmax(smooth)))
  axes.plot(steps, shown, color=BLUE, lw=0.8, alpha=0.28)
  axes.plot(
    steps, smooth, _dot_if_alone(steps), color=BLUE, lw=1.8, label=label
  )


def _last(values: np.ndarray) -> float:
  finite = values[np.isfinite(values)]
  return float(finite[-1]) if len(finite) else float("nan")


def _dot_if_alone(steps: np.ndarray) -> str:
  return "o-" if len(steps) == 1 else "-"


def _plain_number(value: float, _) -> str:
  return f"{value:g}"


def _log_if_wide(axes) -> None:
  """Takes a logarithmic scale with plain numbers if values span much."""
  from matplotlib import ticker

  values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
  values = values[np.isfinite(values)]
  if values.min() <= 0.0 or values.max() < 4.0 * values.min():
    return
  axes.set_yscale("log")
  decades = np.log10(values.max() / values.min())
  within = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)
  axes.yaxis.set_major_locator(
    ticker.LogLocator(subs=within if decades < 2 else (1,))
  )
  axes.yaxis.set_major_formatter(_plain_number)
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _steps_below(axes, last: int) -> None:
  """Gives every panel the same axis, from 0 to the last step."""
  from matplotlib import ticker

  def name(x, _):
    return f"{x / 1000:g}k" if x >= 10_000 else f"{x:,.0f}"

  axes.set_xlabel("step")
  axes.set_xlim(0, 1.02 * last or 1)
  axes.xaxis.set_major_locator(
    ticker.MaxNLocator(6, steps=(1, 2, 5, 10), integer=True)
  )
  axes.xaxis.set_major_formatter(name)


# A metric, and the panel that is drawn if it is there.
PANELS = (
  ("loss", _loss),
  ("validation_loss_t0", _by_time),
  ("learning_rate", _learning_rate),
  ("grad_norm", _gradient),
)
