"""What goes between devices in a step: layers in turn, gradients once."""

import collections
import dataclasses
import math
import re

import pytest

from flowjax.data import config as data_config
from flowjax.models import dit
from flowjax.parallel import mesh as meshes
from flowjax.train import experiment, loop, optim, parts

# No two kernels, stacks of them or batches are of one size.
MODEL = dit.DiTConfig(
  image_size=(8, 8),
  channels=1,
  width=32,
  depth=3,
  heads=4,
  mlp_ratio=5.0,
  num_classes=10,
  position="sincos2d",
  attention="xla",
)
KERNELS = {"modulation": 6, "qkv": 3, "out": 1, "mlp": 5}


def _moves(mesh, accumulate=1, **model):
  """Returns (kind, size, in a loop) of all that a step sends, and the run."""
  config = experiment.Experiment(
    model=dataclasses.replace(MODEL, **model),
    data=data_config.DataConfig(batch_size=32),
    mesh=meshes.MeshConfig(**mesh),
    optim=optim.OptimConfig(accumulate=accumulate),
  )
  run = parts.build(config)
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  found = []
  for line in loop.lower_step(run).compile().as_text().splitlines():
    match = re.search(rf"= (.*?) ({kinds})(?:-start)?\((.*)", line)
    if match:
      inside = "/while/body" in match[3]
      for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
        size = math.prod(int(n) for n in shape.split(",") if n)
        found.append((match[2], size, inside))
  return found, run


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_are_gathered_one_at_a_time_and_again_for_the_gradient(remat):
  moves, _ = _moves(dict(data=1, fsdp=8), remat=remat)
  assert "all-to-all" not in {kind for kind, _, _ in moves}
  gathered = collections.Counter(
    size for kind, size, inside in moves if kind == "all-gather" and inside
  )
  unit = MODEL.width**2
  # The MLP has two of one size.
  assert gathered == {
    part * unit: 4 if name == "mlp" else 2 for name, part in KERNELS.items()
  }
  # Never a whole stack of them.
  outside = {n for kind, n, inside in moves if kind == "all-gather"}
  outside -= gathered.keys()
  assert outside and not outside & {MODEL.depth * size for size in gathered}


@pytest.mark.slow
def test_an_accumulated_batch_is_summed_over_data_once():
  moves, run = _moves(dict(data=8), accumulate=4)
  assert {kind for kind, _, _ in moves} == {"all-reduce"}
  # Within the loop over parts, no more than the mean of a loss.
  assert sum(size for _, size, inside in moves if inside) <= 1
  sent = sum(size for _, size, inside in moves if not inside)
  assert run.parameters <= sent <= 1.01 * run.parameters


@pytest.mark.slow
def test_between_slices_only_parts_of_gradients_go_and_once():
  """Over `fsdp` in each part; then, of what a device keeps, over `data`."""
  moves, run = _moves(dict(data=2, fsdp=4, slices=2), accumulate=4)
  sent = sum(
    size for kind, size, inside in moves if kind == "all-reduce" and not inside
  )
  assert run.parameters / 4 <= sent <= 1.2 * run.parameters / 4
