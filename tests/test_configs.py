"""Every file in configs/ builds, and takes one step at a reduced size."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from flowjax import models
from flowjax.commands import bench, configs
from flowjax.parallel import mesh as meshes
from flowjax.train import loop, parts

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
VARIANTS = {
  "digits_dit.py": [""],
  "digits_nf.py": ["", ":additive"],
  "digits_unconditional.py": [""],
  "digits_pairs.py": [""],
  "digits_autoencoder.py": ["", ":vq", ":vq_ema"],
  "imagenet_autoencoder.py": [
    f":{kind}_f{2**level}" for kind in ("kl", "vq") for level in range(6)
  ],
  "digits_mmdit.py": ["", ":sd3.5", ":sd3.5_large"],
  "digits_flux.py": ["", ":dev"],
  "digits_inpainting.py": [""],
  "scenes_mmdit.py": ["", ":flux"],
  "scenes_layout.py": [""],
  "digits_variation.py": [""],
  "scenes_super_resolution.py": [""],
  "sd3.py": [":medium", ":3.5_medium", ":3.5_large"],
  "flux_dev.py": [""],
  "flux_schnell.py": [""],
  **{
    f"digits_paths/{name}.py": [""]
    for name in (
      "straight_logit_normal",
      "straight_uniform",
      "vp_noise",
      "vp_v",
      "cosine_v",
      "sub_vp",
      "edm",
      "gvp",
    )
  },
  "imagenet_dit.py": [
    f":{size}_{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)
  ],
}
# The published sizes, in millions (arXiv:2212.09748, table 4).
MILLIONS: dict = {
  "s": {2: 33, 4: 33, 8: 33},
  "b": {2: 130, 4: 130, 8: 131},
  "l": {2: 458, 4: 458, 8: 459},
  "xl": {2: 675, 4: 675, 8: 676},
}


TEXT = dict(text_width=8, pooled_width=8, text_tokens=3, image_size=(8, 8))


def test_no_config_is_forgotten():
  found = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")}
  assert found == set(VARIANTS)


@pytest.mark.parametrize(
  "name", [f"{file}{v}" for file, vs in VARIANTS.items() for v in vs]
)
def test_it_builds_and_its_header_says_how_to_run_it(name):
  config = configs.load(str(FOLDER / name), [])
  file, _, variant = name.partition(":")
  header = (FOLDER / file).read_text().split('"""')[1]
  assert f"flowjax train --config=configs/{file}" in header
  if file == "imagenet_autoencoder.py":
    assert variant.endswith(f"_f{config.model.factor}")
  if file == "imagenet_dit.py":
    size, patch = variant.split("_")
    network = models.build(config.model)
    params = jax.eval_shape(network.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Without the variance that the paper's last layer also gives, and with a
    # row of labels for "none".
    assert abs(count / 1e6 - MILLIONS[size][int(patch)]) < 1.0


# digits_dit.py takes its steps in commands/test_commands.py, and
# digits_autoencoder.py:vq_ema in commands/test_autoencoder.py.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("imagenet_dit.py:s_8", dict(width=16, depth=1, heads=2)),
    ("sd3.py:3.5_medium", dict(heads=1, depth=2, dual_layers=1, **TEXT)),
    (
      "flux_dev.py",
      dict(width=128, heads=1, double_depth=1, single_depth=1, **TEXT),
    ),
  ],
)
def test_it_takes_one_step_at_a_reduced_size(name, sizes):
  config = configs.load(str(FOLDER / name), [])
  small = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, dtype="float32", remat="none", **sizes
    ),
    data=dataclasses.replace(
      config.data,
      batch_size=4,
      image_size=sizes.get("image_size", config.data.image_size),
    ),
  )
  run = parts.build(small, jax.devices()[:1])
  rng = np.random.default_rng(0)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.abstract)
  # How a network begins is looked at elsewhere, and takes long to compile.
  params = jax.tree.map(
    lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), zeros.params
  )
  state = zeros._replace(params=params, ema=params)
  with meshes.use(run.mesh):
    batch = bench.random_batch(run)
    state, values = loop.jit_step(run)(state, batch)
  assert int(state.step) == 1 and int(state.skipped) == 0
  assert np.isfinite(float(values["loss"]))
