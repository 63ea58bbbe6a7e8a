"""Every file in configs/ builds, and takes one step at a reduced size."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from flowjax.commands import bench, configs
from flowjax.parallel import mesh as meshes
from flowjax.train import loop, parts

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
VARIANTS = {
  "digits_dit.py": [""],
  "imagenet_dit.py": [
    f":{size}_{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)
  ],
}
# The published sizes, in millions (arXiv:2212.09748, table 1 and section 4).
MILLIONS = {"s_2": 33, "b_2": 130, "l_2": 458, "xl_2": 675}


def test_no_config_is_forgotten():
  assert {path.name for path in FOLDER.glob("*.py")} == set(VARIANTS)


@pytest.mark.parametrize(
  "name", [f"{file}{v}" for file, vs in VARIANTS.items() for v in vs]
)
def test_it_builds_and_its_header_says_how_to_run_it(name):
  config = configs.load(str(FOLDER / name), [])
  file, _, variant = name.partition(":")
  header = (FOLDER / file).read_text().split('"""')[1]
  assert f"flowjax train --config=configs/{file}" in header
  if variant in MILLIONS:
    count = parts.build(config, jax.devices()[:1]).parameters
    assert round(count / 1e6) == MILLIONS[variant]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_dit.py", "imagenet_dit.py:s_8"])
def test_it_takes_one_step_at_a_reduced_size(name):
  config = configs.load(str(FOLDER / name), [])
  small = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, width=16, depth=1, heads=2),
    data=dataclasses.replace(config.data, batch_size=4),
  )
  run = parts.build(small, jax.devices()[:1])
  state = run.initial_state()
  with meshes.use(run.mesh):
    batch = bench.random_batch(run)
    state, values = loop.jit_step(run)(state, batch)
  assert int(state.step) == 1
  assert np.isfinite(float(values["loss"]))
