"""What a task makes of a batch, and which networks it is for."""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import errors
from flowjax.flow import losses
from flowjax.train import experiment, tasks

INPAINTING = tasks.TaskConfig("inpainting", hole=(0.1, 0.5), whole=0.0)
LOWERED = tasks.TaskConfig("super_resolution", factor=2)


drawn_masks = jax.jit(tasks.masks, static_argnums=(0, 2, 3))


def images(batch=6, size=(8, 12), channels=3):
  rng = np.random.default_rng(0)
  drawn = rng.uniform(-1.0, 1.0, (batch, *size, channels))
  return jnp.asarray(drawn, jnp.float32)


@pytest.mark.parametrize("boxes, closing", [(0.0, 0.0), (1.0, 24 / 384)])
def test_a_hole_has_the_share_that_its_law_says(boxes, closing):
  config = dataclasses.replace(INPAINTING, boxes=boxes)
  mask_BHW1 = drawn_masks(config, jax.random.key(0), 1000, (16, 24))
  assert set(np.unique(mask_BHW1)) == {0.0, 1.0}
  share_B = np.asarray(mask_BHW1).mean((1, 2, 3))
  assert 0.1 <= share_B.min() and share_B.max() <= 0.5 + closing
  # Uniform between both: the mean of 1000 is within 4 of its errors, 0.0037.
  assert abs(share_B.mean() - 0.3 - closing / 4) < 0.015 + closing / 4


def test_whole_images_are_masked_as_often_as_said():
  config = dataclasses.replace(INPAINTING, whole=0.25)
  mask_BHW1 = drawn_masks(config, jax.random.key(1), 800, (8, 8))
  whole = np.mean(np.asarray(mask_BHW1).min((1, 2, 3)) == 1.0)
  assert abs(whole - 0.25) < 0.06


@pytest.mark.slow(1)
def test_masks_do_not_hang_on_how_many_are_drawn():
  eight, five = (
    drawn_masks(INPAINTING, jax.random.key(2), count, (8, 8))
    for count in (8, 5)
  )
  np.testing.assert_array_equal(eight[:5], five)
  assert len(np.unique(np.asarray(eight), axis=0)) == 8


@pytest.mark.slow(1)
def test_inpainting_tells_the_mask_and_then_what_it_leaves():
  image_BHWC = images()
  batch = {"image": image_BHWC, "label": jnp.zeros(6, jnp.int32)}
  told = jax.jit(INPAINTING.add)(batch, jax.random.key(0))
  for key in batch:
    np.testing.assert_array_equal(told[key], batch[key])
  mask_BHW1, left_BHWC = np.split(told["context"], [1], axis=-1)
  assert 0.0 < mask_BHW1.mean() < 1.0
  whole = np.broadcast_to(mask_BHW1 == 1.0, image_BHWC.shape)
  assert not left_BHWC[whole].any()
  np.testing.assert_array_equal(left_BHWC[~whole], image_BHWC[~whole])
  assert told["context"].shape[-1] == INPAINTING.channels(3) == 4
  np.testing.assert_array_equal(INPAINTING.shown(told["context"], 3), left_BHWC)


def test_of_a_grey_mask_the_network_is_told_black_and_white():
  image_BHWC, grey = images(1), jnp.linspace(0.0, 1.0, 12)[:, None]
  mask_BHW1 = jnp.broadcast_to(grey, (1, 8, 12, 1))
  told_BHWK = tasks.inpainting_context(image_BHWC, mask_BHW1)
  white_BHW1 = np.asarray(mask_BHW1 > 0.5, np.float32)
  np.testing.assert_array_equal(told_BHWK[..., :1], white_BHW1)
  left_BHWC = image_BHWC * (1.0 - white_BHW1)
  np.testing.assert_array_equal(told_BHWK[..., 1:], left_BHWC)


def test_super_resolution_tells_the_means_of_squares():
  image_BHWC = images(channels=1)
  low_BhwC = np.asarray(tasks.lowered(image_BHWC, 2))
  wanted = np.asarray(image_BHWC)[:, 4:6, 2:4].mean((1, 2))
  np.testing.assert_allclose(low_BhwC[:, 2, 1], wanted, atol=1e-6)
  add = jax.jit(LOWERED.add)
  context = add({"image": image_BHWC}, jax.random.key(0))["context"]
  assert context.shape == image_BHWC.shape and LOWERED.channels(1) == 1
  # Linear between the middles of two squares: a quarter of the way.
  wanted = 0.75 * low_BhwC[:, 0, 2] + 0.25 * low_BhwC[:, 0, 3]
  np.testing.assert_allclose(context[:, 0, 5], wanted, atol=1e-6)


def test_noise_of_a_small_image_has_the_level_that_is_told():
  config = dataclasses.replace(LOWERED, noise=0.8)
  image_BHWC = jnp.zeros((40, 16, 16, 1))
  add = jax.jit(config.add)
  context = add({"image": image_BHWC}, jax.random.key(0))["context"]
  assert context.shape[-1] == config.channels(1) == 2
  level_B = np.asarray(context[:, 0, 0, 1])
  assert np.ptp(np.asarray(context[..., 1]), axis=(1, 2)).max() == 0.0
  assert 0.0 <= level_B.min() < 0.2 and 0.6 < level_B.max() <= 0.8
  # Steps between squares take the same share off the size of every noise.
  size_B = np.asarray(context[..., 0]).std((1, 2))
  assert np.corrcoef(level_B, size_B)[0, 1] > 0.95


def test_a_task_is_the_same_for_the_same_rng_and_part_of_the_loss():
  def loss(params, batch, rng):
    return jnp.sum(batch["context"]), {"rng": rng}

  batch, key = {"image": images()}, jax.random.key(0)
  prepared = jax.jit(INPAINTING.prepared(loss), static_argnums=0)
  one, again, other = (
    prepared(None, batch, each) for each in (key, key, jax.random.key(1))
  )
  assert one[0] == again[0] != other[0]
  assert one[1]["rng"] == key  # What the loss draws is as it was.
  assert tasks.TaskConfig().prepared(loss) is loss


def config_of(task, model="dit", **changes):
  config = experiment.defaults(model)
  size = dict(image_size=(8, 8), channels=1)
  config.data.update(**size)
  config.model.update(**size)
  config.task.name = task
  config.model.update(**changes)
  return config


@pytest.mark.parametrize(
  "task, changes, words",
  [
    ("inpainting", {}, "set config.model.context_channels=2"),
    ("super_resolution", dict(context_channels=2), "context_channels=1"),
    ("painting", {}, "'painting'.*'inpainting'"),
  ],
)
def test_a_network_that_is_shown_something_else_is_refused(
  task, changes, words
):
  with pytest.raises(errors.UserError, match=words):
    experiment.build(config_of(task, **changes))


@pytest.mark.parametrize(
  "task, option",
  [
    ("none", {"factor": 2}),
    ("inpainting", {"noise": 0.1}),
    ("super_resolution", {"hole": (0.1, 0.2)}),
    ("variation", {"whole": 0.5}),
    ("layout", {"boxes": 0.1}),
  ],
)
def test_an_option_of_another_task_is_refused(task, option):
  with pytest.raises(ValueError, match="would be without effect on the task"):
    tasks.TaskConfig(task, **option)


def test_what_a_task_cannot_be_is_refused_at_the_door():
  fits = dict(context_channels=2)
  assert experiment.build(config_of("inpainting", **fits)).task.hole[0] == 0.1
  config = config_of("inpainting", **fits)
  config.task.hole = (0.5, 0.2)
  with pytest.raises(errors.UserError, match="hole = .0.5, 0.2. must be"):
    experiment.build(config)
  config = config_of("super_resolution", context_channels=1)
  config.task.factor = 3
  with pytest.raises(errors.UserError, match="factor = 3 does not divide"):
    experiment.build(config)
  config.task.factor, config.data.buckets = 4, ((8, 8), (4, 16), (6, 10))
  config.model.position = "rope2d"
  with pytest.raises(errors.UserError, match="divide images of 6x10"):
    experiment.build(config)
  config = config_of("inpainting", **fits)
  config.data.pair_source = "digits"
  config.flow.coupling.name = "pairs"
  with pytest.raises(errors.UserError, match="Leave out one of them"):
    experiment.build(config)
  # Weights of others may be read, and not trained without a task.
  untold = experiment.build(config_of("none", **fits))
  with pytest.raises(errors.UserError, match="makes no context"):
    untold.require_context()


def test_validation_is_a_number():
  def predict(params, x_BHWC, t_B, cond, rng):
    return x_BHWC * jnp.mean(cond["context"])

  config = experiment.build(config_of("inpainting", context_channels=2))
  fixed = losses.fixed_time(predict, config.flow.path.build(), times=(0.3, 0.7))
  loss = jax.jit(config.task.prepared(fixed), static_argnums=0)
  batch = {"image": images(channels=1)}
  one, again, other = (
    float(loss(None, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)
  )
  assert one == again != other


@pytest.mark.slow(1)
def test_a_batch_that_is_divided_is_told_the_same():
  mesh = jax.sharding.Mesh(jax.devices(), ("data",))
  divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  noisy = dataclasses.replace(LOWERED, noise=0.5)
  batch = {"image": images(batch=16, size=(8, 8), channels=1)}
  for config in (INPAINTING, noisy):
    add = jax.jit(config.add)
    one = add(batch, jax.random.key(0))["context"]
    many = add(jax.device_put(batch, divided), jax.random.key(0))["context"]
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-6)
