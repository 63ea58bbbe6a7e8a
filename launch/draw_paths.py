"""Draws docs/paths.png: paths between noise and data in the plane.

  python launch/draw_paths.py [OUT.png]

Above, x_t = alpha x + sigma eps for random pairs, which is what training shows
a network. Below, where samples go: the probability-flow ODE of a small network
that has learned from these, by our losses and solvers. A line has the colour of
the cluster in which it ends, and a dot at each tenth of t. One CPU core, about
a minute; needs matplotlib. It prints how many samples end in a cluster.
"""

# Shape suffixes: B batch, F frequencies, T times, N trajectories; the plane
# has 2 coordinates, and so has every last dim that has no letter.

import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowjax.flow import (
  grids,
  losses,
  paths,
  prediction,
  solvers,
  times,
)

OUT = pathlib.Path(__file__).resolve().parent.parent / "docs" / "paths.png"
WIDTH, STEPS, BATCH = 128, 3000, 512
SOLVED, LINES, TENTH = 1200, 64, 12
RADIUS, SPREAD = 3.0, 0.12
COLOURS = (
  "#2563a8", "#0f9aa8", "#2e8b57", "#86a81c", "#e0a00b", "#e0662a", "#c8324b",
  "#7b4fa3",
)  # fmt: skip
SIGMA_DATA = math.sqrt(RADIUS**2 / 2.0 + SPREAD**2)


@dataclasses.dataclass(frozen=True)
class Panel:
  """A path, and the prediction and the law of t that suit it."""

  title: str
  path: paths.Path
  prediction: str
  law: times.TimeLaw
  half_width: float = 3.9


def panels() -> list[Panel]:
  """Returns the columns of the picture."""
  edm = paths.edm(sigma_max=8.0)
  uniform = times.uniform()
  return [
    Panel("straight", paths.straight(), "velocity", times.logit_normal()),
    Panel("gvp", paths.gvp(), "velocity", uniform),
    Panel("cosine", paths.cosine(), "v", uniform),
    Panel("vp", paths.vp(), "v", uniform),
    Panel("sub_vp", paths.sub_vp(), "noise", uniform),
    Panel("edm", edm, "edm", times.log_normal_sigma(0.0, 1.4, path=edm), 15.0),
  ]


def centres() -> Any:
  """Returns the centres of eight clusters on a circle."""
  angle = jnp.arange(8.0) * (math.pi / 4.0) + math.pi / 8.0
  return RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def draw_data(rng: jax.Array, count: int) -> jax.Array:
  """Draws points from the eight clusters."""
  rng_which, rng_off = jax.random.split(rng)
  which_B = jax.random.randint(rng_which, (count,), 0, 8)
  return centres()[which_B] + SPREAD * jax.random.normal(rng_off, (count, 2))


def init(rng: jax.Array) -> list[dict[str, jax.Array]]:
  """Draws the parameters of a perceptron, whose last layer starts at 0."""
  sizes = [2 + 2 * 6 + 1, WIDTH, WIDTH, WIDTH, 2]
  layers = []
  for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
    scale = 0.0 if i == len(sizes) - 2 else fan_in**-0.5
    kernel = jax.random.normal(jax.random.fold_in(rng, i), (fan_in, fan_out))
    layers.append({"kernel": scale * kernel, "bias": jnp.zeros((fan_out,))})
  return layers


def network(params, x_t, t_B, cond, rng):
  """Predicts something at (x_t, t)."""
  del cond, rng
  wave_BF = t_B[:, None] * (math.pi * 2.0 ** jnp.arange(6.0) / 2.0)[None]
  hidden = jnp.concatenate(
    [x_t, t_B[:, None], jnp.sin(wave_BF), jnp.cos(wave_BF)], axis=-1
  )
  for i, layer in enumerate(params):
    hidden = hidden @ layer["kernel"] + layer["bias"][None]
    if i < len(params) - 1:
      hidden = jax.nn.silu(hidden)
  return hidden


def train(panel: Panel, predict: losses.Predictor, rng: jax.Array) -> Any:
  """Returns the parameters after `STEPS` steps of Adam."""
  loss = losses.matching(
    predict,
    panel.path,
    panel.law,
    prediction=panel.prediction,
    sigma_data=SIGMA_DATA,
  )
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

  def step(carry, rng):
    params, state = carry
    rng_data, rng_loss = jax.random.split(rng)
    batch = {"image": draw_data(rng_data, BATCH)}
    grads, _ = jax.grad(loss, has_aux=True)(params, batch, rng_loss)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(rng):
    params = init(rng)
    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, jax.random.split(rng, STEPS))[0][0]

  return run(rng)


def trained(panel: Panel, rng: jax.Array) -> np.ndarray:
  """Returns the ways of samples from noise to data, [T, N, 2]."""
  predict = prediction.preconditioned(
    network, panel.path, panel.prediction, sigma_data=SIGMA_DATA
  )
  rng_train, rng_start = jax.random.split(rng)
  params = train(panel, predict, rng_train)
  velocity = prediction.field(
    lambda x, t: predict(params, x, jnp.broadcast_to(t, x.shape[:1]), {}, None),
    panel.path,
    panel.prediction,
    "velocity",
    sigma_data=SIGMA_DATA,
  )
  heun = solvers.build("heun", panel.path)
  grid = jnp.asarray(grids.uniform(panel.path, 10 * TENTH))
  start = jax.random.normal(rng_start, (SOLVED, 2)) * panel.path.prior_scale
  solve = jax.jit(
    lambda start: solvers.solve(heun, velocity, start, grid, trajectory=True)
  )
  return np.asarray(solve(start))


def conditional(panel: Panel, rng: jax.Array) -> np.ndarray:
  """Returns x_t of random pairs from noise to data, [T, N, 2]."""
  rng_x, rng_eps = jax.random.split(rng)
  x = draw_data(rng_x, SOLVED)
  eps = jax.random.normal(rng_eps, x.shape)
  times_T = jnp.asarray(grids.uniform(panel.path, 10 * TENTH))
  return np.asarray(
    jax.vmap(lambda t: panel.path.interpolate(x, eps, t))(times_T)
  )


def nearest(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the cluster that each point is nearest to, and how far off."""
  away = points[:, None] - np.asarray(centres())[None]
  distance = np.linalg.norm(away, axis=-1)
  return distance.argmin(axis=1), distance.min(axis=1)


def draw(columns: list[tuple[Panel, np.ndarray, np.ndarray]], out) -> None:
  """Draws the picture, in 256 colours."""
  from matplotlib import layout_engine
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure
  from PIL import Image

  figure = Figure(
    figsize=(2.2 * len(columns), 5.1),
    dpi=125,
    facecolor="white",
    layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03),
  )
  canvas = backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots(2, len(columns))
  for j, (panel, *rows) in enumerate(columns):
    for i, way in enumerate(rows):
      _panel(axes[i, j], way, panel.half_width)
    axes[0, j].set_title(panel.title, fontsize=12, fontweight="bold")
    axes[1, j].set_title(
      f"learned as {panel.prediction}", fontsize=9, color="#4b5563"
    )
  for i, text in enumerate(("before: random pairs", "after: the learned ODE")):
    axes[i, 0].set_ylabel(text, fontsize=10.5, color="#4b5563")
  canvas.draw()
  picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  picture.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


def _panel(axes, way, half_width) -> None:
  from matplotlib.collections import LineCollection

  which_N, _ = nearest(way[-1])
  colour_N = np.asarray(COLOURS)[which_N]
  lines = way[:, :LINES]
  axes.add_collection(
    LineCollection(
      list(lines.transpose(1, 0, 2)),
      colors=colour_N[:LINES],
      linewidths=0.8,
      alpha=0.6,
    )
  )
  # Equal steps of t, which tell the speed.
  ticks = lines[TENTH:-1:TENTH]
  axes.scatter(
    *ticks.reshape(-1, 2).T,
    s=3.2,
    c=np.tile(colour_N[:LINES], len(ticks)),
    linewidths=0,
    zorder=2,
  )
  axes.scatter(*lines[0].T, s=7, c="#374151", linewidths=0, zorder=3)
  axes.scatter(*way[-1].T, s=2.5, c=colour_N, linewidths=0, zorder=4)
  axes.set(
    xlim=(-half_width, half_width),
    ylim=(-half_width, half_width),
    aspect="equal",
    xticks=[],
    yticks=[],
  )
  for spine in axes.spines.values():
    spine.set_color("#d1d5db")


def main(out: str = str(OUT)) -> int:
  """Trains, solves and draws."""
  columns = []
  for panel in panels():
    rng = jax.random.key(0)
    way = trained(panel, rng)
    _, off_N = nearest(way[-1])
    near = np.mean(off_N < 4.0 * SPREAD)
    print(f"{panel.title:<10} {near:.1%} end in a cluster", flush=True)
    columns.append((panel, conditional(panel, rng), way))
  draw(columns, out)
  print(out)
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
