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

pytestmark = pytest.mark.usefixtures("traced_once")

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
  rng = np.random.default_rng(seed)
  return rng.uniform(-1.0, 1.0, (count, 8, 8, 1)).astype("f4")


# Many programs for one number of each of many shapes.
norm = jax.jit(optax.global_norm)


def made(config, model):
  """Returns network, parameters and loss; the codebook is spread out.

  To draw them here takes less than to compile what draws them.
  """
  network, rng = config.network(models.build(model)), np.random.default_rng(0)

  def draw(path, leaf):
    if leaf.ndim > 1:
      fan_in = np.prod(leaf.shape[:-1])
      return rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in)
    fill = np.ones if path[-1].key == "scale" else np.zeros
    return fill(leaf.shape, np.float32)

  abstract = jax.eval_shape(network.init, jax.random.key(0))
  params = jax.tree_util.tree_map_with_path(draw, abstract)
  count = getattr(model, "codes", 0)
  code_KD = np.random.default_rng(7).standard_normal((count, 2), np.float32)
  if running.CODEBOOK in params:
    params[running.CODEBOOK] = vq.running(code_KD)
  elif "codebook" in params:
    params["codebook"]["embedding"] = code_KD
  return network, params, reconstruction.loss(config, network)


def gradient(loss, params, x_BHWC):
  rng = jax.random.key(3)
  pull = jax.jit(jax.grad(lambda p: loss(p, {"image": x_BHWC}, rng)[0]))
  return pull(params)


@jax.jit
def _encoded(params, x_BHWC):
  z_BHWC = vq.latents(VQ, params, x_BHWC)
  return z_BHWC, *vq.quantise(params, z_BHWC)


def encoded(params, x_BHWC):
  """Returns latents, vectors and indices, on the host."""
  return map(np.asarray, _encoded(params, x_BHWC))


def summed(index, values):
  """Returns for each code the sum of the values that chose it."""
  total = np.zeros((5, *np.shape(values)[index.ndim :]), np.float32)
  np.add.at(total, index, values)
  return total


@pytest.fixture(name="played", scope="module")
def _played():
  """An adversary's gradient, and all that it should be made of."""
  config = reconstruction.ReconstructionConfig(adversary=AGAINST)
  network, params, loss = made(config, KL)
  return network, params, gradient(loss, params, images())


@pytest.fixture(name="slope", scope="module")
def _slope(played):
  """The generator's gradient, the weight of the adversary being known."""
  network, params, _ = played
  judge = params[adversary.GROUP]

  def plain(own, weight):
    found = network.reconstruct(own, images(), jax.random.key(3))
    image = network.last(own["decoder"]["out"], found.features_BHWC)
    value = jnp.mean(jnp.abs(image - images()))
    value += 1e-6 * jnp.mean(found.penalties["divergence"])
    fooled = adversary.apply(judge, image, **AGAINST.shape)
    return value - weight * jnp.mean(fooled)

  pull = jax.jit(jax.grad(plain))
  return lambda weight: pull(network.own(params), weight)


@pytest.mark.slow(4)
def test_the_generator_learns_by_the_weight_of_both_slopes(played, slope):
  network, params, found = played

  def at_last(tree):
    return np.asarray(tree["decoder"]["out"]["kernel"])

  # The divergence is of the encoder, and has no slope at the last kernel.
  error, both = at_last(slope(0.0)), at_last(slope(1.0))
  against = np.linalg.norm(both - error)
  weight = 0.5 * np.linalg.norm(error) / (against + 1e-4)
  assert 0.01 < weight < 1e4
  close({key: found[key] for key in network.own(params)}, slope(weight))


@pytest.mark.slow(1)
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
  assert norm(wanted) > 0.01


@pytest.mark.slow(1)
def test_before_its_start_there_is_no_adversary(played, slope):
  network, params, _ = played
  late = dataclasses.replace(AGAINST, start=5)
  config = reconstruction.ReconstructionConfig(adversary=late)
  loss = reconstruction.loss(config, network)
  found = gradient(loss, params, images())
  assert norm(found[adversary.GROUP]) == 0.0
  close({key: found[key] for key in network.own(params)}, slope(0.0))
  assert found[running.STEPS]["count"] == -1.0  # The step adds one.


@pytest.mark.slow(1)
def test_a_codebook_and_its_latents_are_drawn_to_each_other():
  weights = dict(codebook=0.7, commitment=0.3)
  config = reconstruction.ReconstructionConfig(distance="l2", **weights)
  _, params, loss = made(config, VQ)
  x_BHWC = images()
  z_BHWC, chosen, index = encoded(params, x_BHWC)
  found = gradient(loss, params, x_BHWC)["codebook"]["embedding"]
  # d/de mean |sg(z) - e|^2 = 2 sum over the latents of e (e - z) / all values.
  wanted = summed(index, 2 * (chosen - z_BHWC) / z_BHWC.size)
  np.testing.assert_allclose(found, 0.7 * wanted, **CLOSE)


def trainer(config, network, params):
  loss = reconstruction.loss(config, network)
  chosen = optim.OptimConfig(clip_norm=1e-3, weight_decay=0.1)
  optimizer = optim.build(chosen, 10, params)
  step = steps.build(
    loss, optimizer, seed=0, ema_config=ema.EmaConfig(), accumulate=2
  )
  begin = jax.jit(lambda params: states.begin(params, optimizer))
  return jax.jit(step), begin(params)


@pytest.mark.slow(3)
def test_a_codebook_that_is_a_moving_average():
  """Its averages move by the decay, unclipped, in parts as the whole would."""
  config = reconstruction.ReconstructionConfig(codebook_decay=0.4)
  network, params, _ = made(config, VQ)
  averages = params[running.CODEBOOK]
  x_BHWC = images(8)
  z_BHWC, _, index = encoded(network.own(params), x_BHWC)
  count_K = summed(index, np.ones(index.shape)) * 5 / index.size
  sum_KD = summed(index, z_BHWC) * 5 / index.size
  step, state = trainer(config, network, params)
  state, values = step(state, {"image": x_BHWC})
  moved = state.params[running.CODEBOOK]
  moved, averages = jax.device_get((moved, averages))
  close(moved["count"], 0.4 * averages["count"] + 0.6 * count_K)
  close(moved["sum"], 0.4 * averages["sum"] + 0.6 * sum_KD)
  code_KD = network.own(state.params)["codebook"]["embedding"]
  close(code_KD, moved["sum"] / moved["count"][:, None])
  # The norm is of what is learned: averages that move far are no part of it.
  far = norm(jax.tree.map(np.subtract, averages, moved))
  assert 0 < values["grad_norm"] < far


def test_a_perceptual_network_stays_as_it_is():
  config = reconstruction.ReconstructionConfig(
    perceptual=reconstruction.PerceptualConfig(weight=1.0, file="none")
  )
  network = config.network(models.build(KL))
  abstract = jax.eval_shape(network.init, jax.random.key(0))
  names = freezing.names(config.frozen, abstract)
  assert len(names) == 13 * 2 + 5
  assert all(name.startswith("perceptual/") for name in names)


@pytest.mark.slow(1)
def test_what_is_held_out_is_scored_and_padding_is_not():
  config = reconstruction.ReconstructionConfig(distance="l2")
  network, params, _ = made(config, VQ)
  loss = jax.jit(reconstruction.validation_loss(config, network))
  x_BHWC, rng = images(), jax.random.key(0)
  value, metrics = loss(params, {"image": x_BHWC}, rng)
  again = jax.jit(
    lambda x: network.decode(params, network.encode(params, x)[0])
  )
  square_B = np.square(again(x_BHWC) - x_BHWC).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(value, square_B.mean(), rtol=1e-5)
  psnr_B = 10 * np.log10(4 / square_B)
  np.testing.assert_allclose(metrics["means"]["psnr"], psnr_B.mean(), rtol=1e-5)
  assert 1 < metrics["means"]["codes_in_use"] <= 5
  padded = {
    "image": np.concatenate([x_BHWC, np.full_like(x_BHWC, np.nan)]),
    "mask": np.repeat(np.array([1, 0], np.float32), 4),
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
    (dict(model=KL, reconstruction=dict(distance="l3")), "'l3' .*Did you"),
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


def drawn(built):
  """Returns a first state, which takes less to draw than to compile."""
  params, _ = made(built.experiment.reconstruction, built.experiment.model)[1:]
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), built.abstract)
  params = jax.device_get(params)  # To be put on devices twice.
  return state._replace(params=params, ema=params)


def trained(mesh, devices, start=None):
  """Returns losses, state and a step: codebook, adversary, parts of a batch."""
  against = dataclasses.replace(AGAINST, start=1)
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
  losses, start = [], start or drawn(built)
  state = jax.device_put(start, parts.shardings_of(built.abstract))
  step, put = loop.jit_step(built), placing.put_whole(built.mesh)

  def stepped(state, image_BHWC):
    with meshes.use(built.mesh):
      return step(state, put({"image": image_BHWC}))

  for i in range(3):
    state, values = stepped(state, images(16, seed=i))
    losses.append(float(values["loss"]))
  return losses, state, stepped, start


@pytest.fixture(name="alone", scope="module")
def _alone():
  return trained({}, jax.devices()[:1])


@pytest.mark.slow
def test_what_runs_along_is_no_part_of_the_optimizer(alone):
  _, state, stepped, _ = alone
  params = jax.device_get(state.params)
  assert params[running.STEPS]["count"] == 3.0
  moments = {
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  }
  assert any(adversary.GROUP in name for name in moments)
  assert not any(group in name for name in moments for group in running.GROUPS)
  # Nothing that is not finite gets in.
  broken = images(16)
  broken[0] = np.nan
  bad, _ = stepped(state, broken)
  assert int(bad.skipped) == 1
  close(bad.params[running.CODEBOOK], params[running.CODEBOOK])
  config = reconstruction.ReconstructionConfig(
    codebook_decay=0.5, adversary=AGAINST
  )
  own = config.network(models.build(VQ)).own(params)
  assert set(own) == {
    "encoder", "decoder", "quant_conv", "post_quant_conv", "codebook"
  }  # fmt: skip


@pytest.mark.slow
def test_devices_train_as_one_does(alone):
  """Codebook, adversary and parts of a batch, over data and fsdp."""
  wanted, _, _, start = alone
  losses, state, *_ = trained(dict(data=2, fsdp=4), jax.devices(), start)
  np.testing.assert_allclose(losses, wanted, rtol=1e-4)
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
