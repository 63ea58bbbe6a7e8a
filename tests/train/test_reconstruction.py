"""What each term of an autoencoder's loss moves, and by how much."""

# Shape suffixes: B batch, H height, W width, C channels, K codes, D width.

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowjax import errors, models
from flowjax.data import config as data_config
from flowjax.models import adversary, autoencoder, vq
from flowjax.parallel import mesh as meshes
from flowjax.parallel import placing
from flowjax.train import (
  ema,
  experiment,
  freezing,
  loop,
  optim,
  parts,
  reconstruction,
  running,
)
from flowjax.train import state as states
from flowjax.train import step as steps

SMALL = dict(
  image_size=(8, 8), channels=1, widths=(8,), depth=1, groups=4,
  latent_channels=2, middle_attention=False,
)  # fmt: skip
KL = autoencoder.AutoencoderConfig(**SMALL)
VQ = vq.VQConfig(**SMALL, codes=5)
AGAINST = reconstruction.AdversaryConfig(weight=0.5, start=0, width=4, layers=1)
CLOSE = dict(rtol=2e-4, atol=1e-6)


def close(a, b):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), a, b)


def images(count=4, seed=0):
  shape = (count, 8, 8, 1)
  return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0)


def made(config, model):
  """Returns network, parameters and loss; the codebook is spread out."""
  network = config.network(models.build(model))
  params = jax.jit(network.init)(jax.random.key(0))
  code_KD = jax.random.normal(jax.random.key(7), (5, 2))
  if running.CODEBOOK in params:
    params[running.CODEBOOK]["sum"] = code_KD
  elif "codebook" in params:
    params["codebook"]["embedding"] = code_KD
  return network, params, reconstruction.loss(config, network)


def gradient(loss, params, x_BHWC):
  rng = jax.random.key(3)
  pull = jax.jit(jax.grad(lambda p: loss(p, {"image": x_BHWC}, rng)[0]))
  return pull(params)


@jax.jit
def encoded(params, x_BHWC):
  z_BHWC = vq.latents(VQ, params, x_BHWC)
  return z_BHWC, *vq.quantise(params, z_BHWC)


@pytest.fixture(name="played", scope="module")
def _played():
  """An adversary's gradient, and all that it should be made of."""
  config = reconstruction.ReconstructionConfig(adversary=AGAINST)
  network, params, loss = made(config, KL)
  return network, params, gradient(loss, params, images())


def plain(network, params, weight, x_BHWC=None):
  """Returns the generator's loss, the weight of the adversary being known."""
  x_BHWC = images() if x_BHWC is None else x_BHWC
  judge = params[adversary.GROUP]

  def loss(own):
    found = network.reconstruct(own, x_BHWC, jax.random.key(3))
    image = network.last(own["decoder"]["out"], found.features_BHWC)
    value = jnp.mean(jnp.abs(image - x_BHWC))
    value += 1e-6 * jnp.mean(found.penalties["divergence"])
    fooled = adversary.apply(judge, image, **AGAINST.shape)
    return value - weight * jnp.mean(fooled)

  return loss


def test_the_generator_learns_by_the_weight_of_both_slopes(played):
  network, params, found = played
  own = network.own(params)
  kernel = ("decoder", "out", "kernel")

  def at_last(loss):
    tree = jax.jit(jax.grad(loss))(own)
    for key in kernel:
      tree = tree[key]
    return jnp.linalg.norm(tree)

  free = plain(network, params, 0.0)

  def error(own):
    made = network.reconstruct(own, images(), jax.random.key(3))
    image = network.last(own["decoder"]["out"], made.features_BHWC)
    return jnp.mean(jnp.abs(image - images()))

  def against(own):
    return plain(network, params, 1.0)(own) - free(own)

  weight = 0.5 * at_last(error) / (at_last(against) + 1e-4)
  assert 0.01 < weight < 1e4
  wanted = jax.jit(jax.grad(plain(network, params, weight)))(own)
  close({key: found[key] for key in own}, wanted)


def test_the_discriminator_learns_to_tell(played):
  network, params, found = played
  own, x_BHWC = network.own(params), images()

  def hinge(judge):
    made = network.reconstruct(own, x_BHWC, jax.random.key(3))
    image = network.last(own["decoder"]["out"], made.features_BHWC)
    real, false = (
      adversary.apply(judge, x, **AGAINST.shape) for x in (x_BHWC, image)
    )
    return 0.5 * (
      jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + false))
    )

  wanted = jax.jit(jax.grad(hinge))(params[adversary.GROUP])
  close(found[adversary.GROUP], wanted)
  assert optax.global_norm(wanted) > 0.01


def test_before_its_start_there_is_no_adversary(played):
  network, params, _ = played
  late = dataclasses.replace(AGAINST, start=5)
  config = reconstruction.ReconstructionConfig(adversary=late)
  loss = reconstruction.loss(config, network)
  found = gradient(loss, params, images())
  assert optax.global_norm(found[adversary.GROUP]) == 0.0
  own = network.own(params)
  wanted = jax.jit(jax.grad(plain(network, params, 0.0)))(own)
  close({key: found[key] for key in own}, wanted)
  assert found[running.STEPS]["count"] == -1.0  # The step adds one.


def test_a_codebook_and_its_latents_are_drawn_to_each_other():
  weights = dict(codebook=0.7, commitment=0.3)
  config = reconstruction.ReconstructionConfig(distance="l2", **weights)
  _, params, loss = made(config, VQ)
  x_BHWC = images()
  z_BHWC, chosen, index = encoded(params, x_BHWC)
  found = gradient(loss, params, x_BHWC)["codebook"]["embedding"]
  # d/de mean |sg(z) - e|^2 = 2 sum over the latents of e (e - z) / all values.
  wanted = jnp.zeros((5, 2)).at[index].add(2 * (chosen - z_BHWC) / z_BHWC.size)
  np.testing.assert_allclose(found, 0.7 * wanted, **CLOSE)


def trainer(config, network, params, accumulate=1):
  loss = reconstruction.loss(config, network)
  chosen = optim.OptimConfig(clip_norm=1e-3, weight_decay=0.1)
  optimizer = optim.build(chosen, 10, params)
  step = steps.build(
    loss, optimizer, seed=0, ema_config=ema.EmaConfig(), accumulate=accumulate
  )
  return jax.jit(step), states.begin(params, optimizer)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_codebook_that_is_a_moving_average(accumulate):
  """Its averages move by the decay, unclipped, alike in parts as whole."""
  config = reconstruction.ReconstructionConfig(codebook_decay=0.8)
  network, params, _ = made(config, VQ)
  averages = params[running.CODEBOOK]
  x_BHWC = images(8)
  z_BHWC, _, index = encoded(network.own(params), x_BHWC)
  count_K = jnp.zeros(5).at[index].add(1.0) * 5 / index.size
  sum_KD = jnp.zeros((5, 2)).at[index].add(z_BHWC) * 5 / index.size
  step, state = trainer(config, network, params, accumulate)
  state, values = step(state, {"image": x_BHWC})
  moved = state.params[running.CODEBOOK]
  close(moved["count"], 0.8 * averages["count"] + 0.2 * count_K)
  close(moved["sum"], 0.8 * averages["sum"] + 0.2 * sum_KD)
  code_KD = network.own(state.params)["codebook"]["embedding"]
  close(code_KD, moved["sum"] / moved["count"][:, None])
  # The norm is of what is learned: averages that move far are no part of it.
  far = optax.global_norm(jax.tree.map(jnp.subtract, averages, moved))
  assert 0 < values["grad_norm"] < far


def test_what_runs_along_is_no_part_of_the_optimizer():
  config = reconstruction.ReconstructionConfig(
    codebook_decay=0.8, adversary=AGAINST
  )
  network, params, _ = made(config, VQ)
  step, state = trainer(config, network, params)
  for _ in range(2):
    state, values = step(state, {"image": images()})
  assert state.params[running.STEPS]["count"] == 2.0
  moments = {
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  }
  assert any(adversary.GROUP in name for name in moments)
  assert not any(group in name for name in moments for group in running.GROUPS)
  # Nothing that is not finite gets in.
  bad, _ = step(state, {"image": images().at[0].set(jnp.nan)})
  assert int(bad.skipped) == 1
  close(bad.params[running.CODEBOOK], state.params[running.CODEBOOK])
  assert set(network.own(params)) == {
    "encoder", "decoder", "quant_conv", "post_quant_conv", "codebook"
  }  # fmt: skip


def test_a_perceptual_network_stays_as_it_is():
  config = reconstruction.ReconstructionConfig(
    perceptual=reconstruction.PerceptualConfig(weight=1.0, file="none")
  )
  network = config.network(models.build(KL))
  abstract = jax.eval_shape(network.init, jax.random.key(0))
  names = freezing.names(config.frozen, abstract)
  assert len(names) == 13 * 2 + 5
  assert all(name.startswith("perceptual/") for name in names)


def test_what_is_held_out_is_scored_and_padding_is_not():
  config = reconstruction.ReconstructionConfig(distance="l2")
  network, params, _ = made(config, VQ)
  loss = jax.jit(reconstruction.validation_loss(config, network))
  x_BHWC, rng = images(), jax.random.key(0)
  value, metrics = loss(params, {"image": x_BHWC}, rng)
  again = jax.jit(
    lambda x: network.decode(params, network.encode(params, x)[0])
  )
  square_B = jnp.mean(jnp.square(again(x_BHWC) - x_BHWC), axis=(1, 2, 3))
  np.testing.assert_allclose(value, square_B.mean(), rtol=1e-5)
  psnr_B = 10 * np.log10(4 / square_B)
  np.testing.assert_allclose(metrics["means"]["psnr"], psnr_B.mean(), rtol=1e-5)
  assert 1 < metrics["means"]["codes_in_use"] <= 5
  padded = {
    "image": jnp.concatenate([x_BHWC, jnp.full_like(x_BHWC, jnp.nan)]),
    "mask": jnp.repeat(jnp.array([1.0, 0.0]), 4),
  }
  again, found = loss(params, padded, rng)
  np.testing.assert_allclose(again, value, rtol=1e-5)
  close(found["means"], metrics["means"])


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    (dict(model=KL, flow=dict(prediction="noise")), "flow is for networks"),
    (dict(model=KL, lora=dict(rank=2)), "lora is for networks"),
    (dict(model=KL, reconstruction=dict(codebook=2.0)), "without effect on"),
    (dict(model=VQ, reconstruction=dict(divergence=1.0)), "without effect on"),
    (dict(model=KL, reconstruction=dict(distance="l3")), "l1, l2"),
    (
      dict(model=KL, reconstruction=dict(adversary=dict(weight=1.0))),
      "leaves no patch",
    ),
    (
      dict(reconstruction=dict(distance="l2")),
      "reconstruction is for autoencoders",
    ),
  ],
)
def test_what_would_be_without_effect_is_refused(changes, text):
  values = experiment.defaults(
    changes["model"].name if "model" in changes else "dit"
  ).to_dict()
  for group, value in changes.items():
    value = dataclasses.asdict(value) if group == "model" else value
    values[group] = {**values[group], **value}
  values["data"] |= dict(image_size=(8, 8), channels=1)
  values["model"] |= dict(image_size=(8, 8), channels=1)
  with pytest.raises(errors.UserError, match=text):
    experiment.build(values)
  assert data_config.DataConfig().image_size == (8, 8)


@pytest.mark.slow
def test_devices_train_as_one_does():
  """Codebook, adversary and parts of a batch, over data and fsdp."""
  against = dataclasses.replace(AGAINST, start=1)

  def run(mesh, devices):
    built = parts.build(
      experiment.Experiment(
        model=dataclasses.replace(VQ, codes=8),
        data=data_config.DataConfig(batch_size=16),
        mesh=meshes.MeshConfig(**mesh),
        optim=optim.OptimConfig(learning_rate=1e-3, accumulate=2),
        reconstruction=reconstruction.ReconstructionConfig(
          codebook_decay=0.5, adversary=against
        ),
      ),
      devices,
    )
    losses, state = [], built.initial_state()
    with meshes.use(built.mesh):
      step, put = loop.jit_step(built), placing.put_whole(built.mesh)
      for i in range(3):
        batch = {"image": np.asarray(images(16, seed=i))}
        state, values = step(state, put(batch))
        losses.append(float(values["loss"]))
    return losses, state

  alone, _ = run({}, jax.devices()[:1])
  losses, state = run(dict(data=2, fsdp=4), jax.devices())
  np.testing.assert_allclose(losses, alone, rtol=1e-4)
  assert losses[1] > losses[0]  # The discriminator came to it.
  kernel = state.params["decoder"]["middle"]["block_0"]["conv_1"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  moment = state.opt_state[1].mu["encoder"]["in"]["kernel"]
  assert moment.sharding.spec == (
    jax.sharding.PartitionSpec(None, None, None, "fsdp")
  )


def test_meshes_that_would_compute_the_same_are_refused():
  with pytest.raises(errors.UserError, match="config.mesh.tensor = 2"):
    parts.check_divides(KL, {"data": 1, "fsdp": 1, "tensor": 2, "context": 1})
