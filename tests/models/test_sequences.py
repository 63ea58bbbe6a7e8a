"""Two sequences as one, in parts that devices have already."""

# Shape suffixes: B batch, L text tokens, T image tokens, S = L + T.

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models import positions, sequences
from flowjax.parallel import mesh as meshes


def pair(length=5, tokens=7):
  text = np.arange(6 * length, dtype=np.float32).reshape(2, length, 3)
  return text, -np.arange(6 * tokens, dtype=np.float32).reshape(2, tokens, 3)


@pytest.fixture(params=[1, 4], ids=["one", "four"])
def parts(request):
  sizes = dict(data=8 // request.param, context=request.param)
  with meshes.use(meshes.build(meshes.MeshConfig(**sizes))):
    yield request.param


def test_one_device_has_the_text_and_then_the_image():
  text, image = map(jnp.asarray, pair())
  assert sequences.even(text) is text
  np.testing.assert_array_equal(
    sequences.woven(text, image), np.concatenate([text, image], axis=1)
  )
  assert sequences.seen(None, 2, 5) is None
  assert sequences.woven_masks(None, None, 2, (5, 7)) is None


def test_parting_undoes_weaving(parts):

  @jax.jit
  def there_and_back(text, image):
    text, image = map(sequences.even, (text, image))
    both = sequences.woven(text, image)
    return text, image, both, sequences.parted(both, text.shape[1])

  text, image, both, found = jax.device_get(there_and_back(*pair()))
  np.testing.assert_array_equal(found[0], text)
  np.testing.assert_array_equal(found[1], image)
  # The part of a device is that of the text, then that of the image.
  each = both.shape[1] // parts
  here = text.shape[1] // parts
  np.testing.assert_array_equal(both[:, :here], text[:, :here])
  np.testing.assert_array_equal(both[:, here:each], image[:, : each - here])


def test_weaving_and_parting_move_nothing():
  shape = (2, 8, 3)
  with meshes.use(meshes.build(meshes.MeshConfig(data=2, context=4))) as mesh:
    spec = jax.sharding.PartitionSpec("data", "context")
    placed = jax.sharding.NamedSharding(mesh, spec)
    stream = jax.ShapeDtypeStruct(shape, np.float32, sharding=placed)

    def there_and_back(text, image):
      both = sequences.woven(text, image)
      both = jax.lax.with_sharding_constraint(jnp.sin(both), placed)
      return sequences.parted(both, 8)

    program = jax.jit(there_and_back, out_shardings=placed)
    text = program.lower(stream, stream).compile().as_text()
  for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert kind not in text


def test_what_fills_is_hidden_and_what_is_hidden_stays(parts):

  @jax.jit
  def masks(mask_BL):
    text = sequences.seen(mask_BL, 2, 5)
    image = sequences.seen(None, 2, 7)
    assert (image is None) == (parts == 1)
    lengths = tuple(x.shape[1] for x in map(sequences.even, pair()))
    mask_BS = sequences.woven_masks(text, image, 2, lengths)
    real = [sequences.even(jnp.ones((2, n, 1))) for n in (5, 7)]
    real[0] = real[0].at[:, :5, 0].multiply(mask_BL)
    return mask_BS, sequences.woven(*real)[..., 0] > 0

  mask_BL = np.array([[True, True, False, True, False], [True] * 5])
  mask_BS, wanted_BS = jax.device_get(masks(mask_BL))
  np.testing.assert_array_equal(mask_BS, wanted_BS)
  assert mask_BS.sum() == 2 * 12 - 2


def test_ropes_follow_their_tokens(parts):
  ropes = [positions.rope2d(1, n, 8, 10.0) for n in (5, 7)]

  @jax.jit
  def there_and_back():
    even = [sequences.even_rope(rope) for rope in ropes]
    length = even[0][0].shape[0]
    return [
      sequences.parted(table[None], length)
      for table in sequences.woven_rope(*even)
    ]

  for which, found in enumerate(jax.device_get(there_and_back())):
    for part, rope in zip(found, ropes, strict=True):
      np.testing.assert_array_equal(part[0, : len(rope[which])], rope[which])
