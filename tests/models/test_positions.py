# Shape suffixes: B batch, T tokens, N heads, H head size.

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models import positions

ROWS, COLUMNS = 3, 5


def place(token):
  return divmod(token, COLUMNS)


def test_sincos2d_is_the_closed_form():
  width = 16
  table_TD = positions.sincos2d(ROWS, COLUMNS, width)
  assert table_TD.shape == (ROWS * COLUMNS, width)
  for token in range(ROWS * COLUMNS):
    row, column = place(token)
    wanted = []
    for position in (column, row):
      angles = [position / 10000 ** (i / 4) for i in range(4)]
      wanted += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
    np.testing.assert_allclose(table_TD[token], wanted, atol=1e-6)


@pytest.mark.slow
def test_rotate_is_a_complex_product_by_row_then_by_column():
  theta, head_size = 100.0, 8
  rng = np.random.default_rng(0)
  x_BTNH = rng.standard_normal((2, ROWS * COLUMNS, 3, head_size))
  x_BTNH = x_BTNH.astype(np.float32)
  tables = positions.rope2d(ROWS, COLUMNS, head_size, theta)
  y_BTNH = np.asarray(jax.jit(positions.rotate)(x_BTNH, *tables))

  z = x_BTNH[..., 0::2] + 1j * x_BTNH[..., 1::2]
  for token in range(ROWS * COLUMNS):
    row, column = place(token)
    # Two pairs turn with the row, two with the column.
    angle = [row, row * theta**-0.5, column, column * theta**-0.5]
    turned = z[:, token] * np.exp(1j * np.asarray(angle))
    np.testing.assert_allclose(
      y_BTNH[:, token, :, 0::2], turned.real, atol=1e-5
    )
    np.testing.assert_allclose(
      y_BTNH[:, token, :, 1::2], turned.imag, atol=1e-5
    )


def test_rotated_scores_depend_on_offsets_alone():
  rng = np.random.default_rng(1)
  q_H, k_H = rng.standard_normal((2, 16)).astype(np.float32)
  tokens = ROWS * COLUMNS
  tables = positions.rope2d(ROWS, COLUMNS, 16, 10000.0)
  rotate = jax.jit(positions.rotate)
  q_TH, k_TH = (
    np.asarray(rotate(np.broadcast_to(x, (1, tokens, 1, 16)), *tables))[0, :, 0]
    for x in (q_H, k_H)
  )
  by_offset: dict[tuple[int, int], list[float]] = {}
  for t in range(tokens):
    for s in range(tokens):
      offset = tuple(np.subtract(place(t), place(s)))
      by_offset.setdefault(offset, []).append(float(q_TH[t] @ k_TH[s]))
  assert len(by_offset) == (2 * ROWS - 1) * (2 * COLUMNS - 1)
  assert max(np.ptp(scores) for scores in by_offset.values()) < 2e-5
  # And on nothing less: neighbouring offsets differ.
  assert abs(by_offset[0, 1][0] - by_offset[0, 0][0]) > 0.1
  assert abs(by_offset[1, 0][0] - by_offset[0, 0][0]) > 0.1


def test_rotate_works_in_float32_and_keeps_the_dtype():
  x_BTNH = np.random.default_rng(2).standard_normal((1, 4096, 1, 4))
  x_BTNH = jax.numpy.asarray(x_BTNH, "bfloat16")
  tables = positions.rope2d(64, 64, 4, 10000.0)
  y_BTNH = jax.jit(positions.rotate)(x_BTNH, *tables)
  assert y_BTNH.dtype == "bfloat16"
  exact = jax.jit(positions.rotate)(x_BTNH.astype("float32"), *tables)
  # One rounding at the end, and none before it.
  np.testing.assert_array_equal(y_BTNH, exact.astype("bfloat16"))


@pytest.mark.parametrize("head_size", [4, 64, 72])
def test_tables_have_one_angle_per_pair(head_size):
  cos_TH, sin_TH = positions.rope2d(2, 3, head_size, 10000.0)
  assert cos_TH.shape == sin_TH.shape == (6, head_size)
  assert cos_TH.dtype == sin_TH.dtype == np.float32
  np.testing.assert_array_equal(cos_TH[:, 0::2], cos_TH[:, 1::2])


def test_each_axis_turns_its_own_part_of_a_head():
  place_TA = np.array([[0, 0, 0], [3, 0, 0], [0, 5, 0], [0, 0, 7], [2, 4, 6]])
  sizes, theta = (2, 4, 6), 100.0
  cos_TH, sin_TH = positions.rope_axes(place_TA, sizes, theta)
  assert cos_TH.shape == sin_TH.shape == (5, 12)
  for token, places in enumerate(place_TA):
    angles = []
    for place, size in zip(places, sizes, strict=True):
      angles += [place * theta ** (-2 * i / size) for i in range(size // 2)]
    wanted = np.exp(1j * np.repeat(angles, 2))
    np.testing.assert_allclose(cos_TH[token], wanted.real, atol=1e-6)
    np.testing.assert_allclose(sin_TH[token], wanted.imag, atol=1e-6)
  # The origin is not turned, to the bit.
  assert np.all(cos_TH[0] == 1.0) and np.all(sin_TH[0] == 0.0)


def test_far_from_the_origin_angles_keep_their_digits():
  place_TA = np.array([[99_999]])
  cos_TH, sin_TH = positions.rope_axes(place_TA, (4,), 10000.0)
  for pair, angle in enumerate((99_999, 999.99)):
    np.testing.assert_allclose(cos_TH[0, 2 * pair], np.cos(angle), atol=1e-7)
    np.testing.assert_allclose(sin_TH[0, 2 * pair], np.sin(angle), atol=1e-7)


def test_rope2d_is_rows_and_columns_as_two_axes():
  place_TA = np.array([place(token) for token in range(ROWS * COLUMNS)])
  ours = positions.rope2d(ROWS, COLUMNS, 16, 100.0)
  wanted = positions.rope_axes(place_TA, (8, 8), 100.0)
  np.testing.assert_array_equal(ours, wanted)


def test_positions_are_rounded_with_the_sum_alone():
  # Rounded before, 0.999 is 1 in bfloat16, and 259 is rounded to 260.
  x_BTD = jnp.full((2, 3, 4), 258.0, jnp.bfloat16)
  y_BTD = positions.added(x_BTD, np.full((3, 4), 0.999, np.float32))
  assert y_BTD.dtype == jnp.bfloat16 and np.all(y_BTD == 258.0)


@pytest.mark.parametrize("size", [(8, 12), (4, 16), (14, 6), (10, 10)])
def test_every_aspect_has_the_places_that_diffusers_cuts_out(size):
  embeddings = pytest.importorskip("diffusers.models.embeddings")
  side, base, patch, width = 10, 6, 2, 16
  made = embeddings.PatchEmbed(
    height=base * patch,
    width=base * patch,
    patch_size=patch,
    embed_dim=width,
    pos_embed_max_size=side,
  )
  rows, columns = size[0] // patch, size[1] // patch
  ours = positions.sincos2d_centre(rows, columns, width, side, base / side)
  theirs = made.cropped_pos_embed(*size)[0].numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 8), (8, 3)])
def test_aspects_stand_where_the_paper_on_sd3_has_them(rows, columns):
  """At ((p - (h_max - s) / 2) 256 / S), the centre of p = 0 .. h_max - 1."""
  patch, pixels, largest, width = 16, 64, 8, 8
  side = pixels // patch
  scale, offset = 256 / pixels, (largest - side) / 2
  ours = positions.sincos2d_centre(
    rows, columns, width, largest, scale, offset
  ).reshape(rows, columns, width)
  every = (np.arange(largest) - (largest - side) / 2) * 256 / pixels

  def centre(count):
    first = (largest - count) // 2
    return every[first : first + count]

  # The first of the waves is that of the place itself.
  for row, place in enumerate(centre(rows)):
    np.testing.assert_allclose(
      ours[row, :, width // 2], np.sin(place), atol=1e-6
    )
  for column, place in enumerate(centre(columns)):
    np.testing.assert_allclose(ours[:, column, 0], np.sin(place), atol=1e-6)
