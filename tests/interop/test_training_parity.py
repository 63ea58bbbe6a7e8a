"""A step of training moves the weights as PyTorch moves those of diffusers.

The same weights, batch, draws and AdamW, with decay, warm-up and clipping. Its
epsilon is larger than usual: a first step of Adam is lr g / (|g| + epsilon),
which for the usual 1e-8 is the sign of a gradient, also where g is zero but
for rounding.
"""

# Shape suffixes: B batch, H height, W width, C channels, L text tokens.

import jax
import numpy as np
import pytest

from flowjax import models, schema
from flowjax.interop import diffusers_check, diffusers_configs, formats
from flowjax.models import flux, mmdit
from flowjax.parallel import mesh as meshes
from flowjax.train import experiment, loop, parts, presets
from flowjax.train import state as states

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHARED = dict(
  image_size=(4, 4),
  channels=2,
  heads=2,
  text_width=12,
  pooled_width=10,
  condition_dropout=0.4,
)
SD3 = mmdit.MMDiTConfig(
  **SHARED,
  depth=3,
  head_size=16,
  position_table=8,
  qk_norm=True,
)
FLUX = flux.FluxConfig(
  **SHARED, width=32, double_depth=1, single_depth=2, rope_axes=(4, 6, 6)
)
BATCH, LENGTH, SEED, CLIP = 6, 5, 7, 0.5
# What text asks in the last block of SD3 is answered for nobody; kernels decay.
LAST = "transformer_blocks.2.attn."
UNUSED = {
  "mmdit": {f"{LAST}add_q_proj.bias", f"{LAST}norm_added_q.weight"},
  "flux": set(),
}
RATE, DECAY, EPSILON = 1e-2, 0.1, 1e-4


def experiment_of(model):
  """Returns the experiment that trains a network on one device."""
  config = experiment.defaults(model.name)
  config.model.update(schema.to_dict(model))
  config.data.update(
    image_size=model.image_size, channels=model.channels, batch_size=BATCH
  )
  presets.apply(config, "sd3")
  config.seed = SEED
  config.optim.update(
    learning_rate=RATE, weight_decay=DECAY, epsilon=EPSILON, clip_norm=CLIP
  )
  return experiment.build(config)


def draw_batch(model):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal((BATCH, *shape), np.float32)

  return {
    "image": normal(*model.image_size, model.channels),
    "text": normal(LENGTH, model.text_width),
    "pooled": normal(model.pooled_width),
  }


def draws_of(config, network, batch):
  """Returns what step 0 of the config draws: t, noise, and the conditions."""
  rng = jax.random.fold_in(jax.random.key(SEED), 0)
  rng_t, rng_noise, rng_network = jax.random.split(rng, 3)
  tokens = int(np.prod(config.model.grid))
  law = config.flow.law.build(config.flow.path.build(), tokens)
  drop_B = np.asarray(
    jax.random.bernoulli(
      rng_network, network.config.condition_dropout, (BATCH,)
    )
  )
  assert 0 < drop_B.sum() < BATCH
  cond = {
    key: np.where(
      drop_B.reshape(-1, *(1,) * (batch[key].ndim - 1)), 0, batch[key]
    )
    for key in ("text", "pooled")
  }
  noise_BHWC = jax.random.normal(rng_noise, batch["image"].shape)
  return np.array(law.sample(rng_t, (BATCH,))), np.array(noise_BHWC), cond


def optimizer_of(theirs, table, params):
  """Returns PyTorch's AdamW, in which kernels decay and nothing else."""
  kernels = jax.tree_util.tree_map_with_path(
    lambda path, x: np.full_like(x, path[-1].key == "kernel"), params
  )
  decays = {key: bool(x.all()) for key, x in table.to_theirs(kernels)}
  groups = [
    {
      "params": [
        x for key, x in theirs.named_parameters() if decays[key] == on
      ],
      "weight_decay": DECAY * on,
    }
    for on in (True, False)
  ]
  return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=EPSILON)


@pytest.mark.slow
@pytest.mark.parametrize("model", [SD3, FLUX], ids=["sd3", "flux"])
def test_a_step_moves_the_weights_as_in_pytorch(model, draw):
  config, batch = experiment_of(model), draw_batch(model)
  run = parts.build(config, jax.devices()[:1])
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x + (path[-1].key == "scale"), draw(model)
  )
  table = formats.layout(model, "diffusers")
  before = dict(table.to_theirs(params))

  content = diffusers_configs.write(model)
  theirs = getattr(diffusers, content["_class_name"]).from_config(content)
  theirs.load_state_dict({k: torch.tensor(x) for k, x in before.items()})
  optimizer = optimizer_of(theirs, table, params)
  t_B, noise_BHWC, cond = draws_of(config, models.build(model), batch)
  t_B111, x_BHWC = t_B[:, None, None, None], batch["image"]
  xt_BHWC = (1.0 - t_B111) * x_BHWC + t_B111 * noise_BHWC
  v_BHWC = diffusers_check.run(theirs, model, xt_BHWC, t_B, cond)
  loss = torch.nn.functional.mse_loss(
    v_BHWC, torch.from_numpy(noise_BHWC - x_BHWC)
  )
  loss.backward()
  norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
  assert norm > CLIP
  optimizer.step()

  with meshes.use(run.mesh):
    begin = jax.jit(lambda params: states.begin(params, run.optimizer))
    state, metrics = loop.jit_step(run)(begin(params), batch)
  assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
  assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
  after = dict(table.to_theirs(state.params))
  wanted = {key: x.detach().numpy() for key, x in theirs.named_parameters()}
  assert wanted.keys() <= after.keys()
  for key, value in wanted.items():
    np.testing.assert_allclose(
      after[key], value, atol=1e-5, rtol=0, err_msg=key
    )
  moved = {k for k, x in wanted.items() if np.abs(x - before[k]).max() > 1e-4}
  assert moved == wanted.keys() - UNUSED[model.name]
