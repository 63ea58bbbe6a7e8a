"""What a network is told, is not told, and refuses to be told."""

# Shape suffixes: B batch, L text tokens, E and P widths of the text and of the
# pooled text, K labels and none.

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax.models import conditions

READS_TEXT = types.SimpleNamespace(
  num_classes=0,
  context_channels=0,
  label_tokens=2,
  text_tokens=3,
  text_width=4,
  pooled_width=5,
  size_conditioning=False,
  condition_dropout=0.3,
)
READS_LABELS = types.SimpleNamespace(**{**vars(READS_TEXT), "num_classes": 7})


def draw(batch=2, mask=True, negative=True, seed=0):
  rng = np.random.default_rng(seed)
  cond = {
    "text": jnp.asarray(rng.standard_normal((batch, 3, 4), np.float32)),
    "pooled": jnp.asarray(rng.standard_normal((batch, 5), np.float32)),
  }
  if mask:
    cond["text_mask"] = jnp.asarray(rng.random((batch, 3)) < 0.5)
  if negative:
    cond["negative"] = draw(batch, mask, False, seed + 1)
  return cond


def test_without_a_condition_the_label_is_the_last():
  cond = {"label": jnp.asarray([3, 1]), "other": jnp.ones(2)}
  without = conditions.unconditional(READS_LABELS, cond)
  np.testing.assert_array_equal(without["label"], [7, 7])
  assert without["label"].dtype == cond["label"].dtype
  assert without["other"] is cond["other"]


def test_without_a_condition_the_text_is_zeros_of_full_length():
  cond = {**draw(negative=False), "guidance": jnp.ones(2)}
  without = conditions.unconditional(READS_TEXT, cond)
  assert not without["text"].any() and not without["pooled"].any()
  assert without["text_mask"].all()
  assert without["guidance"] is cond["guidance"]
  assert jax.tree.structure(without) == jax.tree.structure(cond)


def test_a_negative_text_stands_in_where_there_is_one():
  cond = draw()
  without = conditions.unconditional(READS_TEXT, cond)
  for key in ("text", "pooled", "text_mask"):
    assert without[key] is cond["negative"][key]
  assert jax.tree.structure(without) == jax.tree.structure(cond)


@pytest.mark.parametrize("negative", [False, True])
def test_each_example_loses_all_of_its_text_at_the_rate_of_the_config(negative):
  cond = draw(batch=1000, negative=negative)
  without = conditions.unconditional(READS_TEXT, cond)
  drop = jax.jit(functools.partial(conditions.dropped, READS_TEXT))
  found, other = (
    jax.device_get(drop(cond, jax.random.key(seed))) for seed in (0, 1)
  )
  without = jax.device_get(without)
  assert jax.tree.structure(found) == jax.tree.structure(cond)
  dropped_B = np.all(found["text"] == without["text"], axis=(1, 2))
  assert abs(dropped_B.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1000)
  for key in ("text", "pooled", "text_mask"):
    np.testing.assert_array_equal(
      found[key][dropped_B], without[key][dropped_B]
    )
    np.testing.assert_array_equal(found[key][~dropped_B], cond[key][~dropped_B])
  assert not np.array_equal(other["text"], found["text"])


def test_labels_are_dropped_alike():
  cond = {"label": jnp.zeros(1000, jnp.int32), "other": jnp.ones(2)}
  found = conditions.dropped(READS_LABELS, cond, jax.random.key(0))
  assert set(np.unique(found["label"])) == {0, 7}
  assert abs(np.mean(found["label"] == 7) - 0.3) < 0.06
  assert found["other"] is cond["other"]


def test_a_label_has_a_text_of_its_own():
  module = conditions.LabelEmbed(7, 2, 4, 5)
  label_B = jnp.asarray([6, 7, 6])
  params = module.init(jax.random.key(0), label_B)["params"]
  assert params["text"].shape == (8, 2, 4) and params["pooled"].shape == (8, 5)
  text_BLE, pooled_BP = module.apply({"params": params}, label_B)
  np.testing.assert_array_equal(text_BLE, params["text"][label_B])
  np.testing.assert_array_equal(pooled_BP, params["pooled"][label_B])
  assert conditions.text_length(READS_LABELS) == 2
  assert conditions.text_length(READS_TEXT) == 3


@pytest.mark.parametrize("config", [READS_TEXT, READS_LABELS])
def test_an_example_is_what_is_accepted(config):
  conditions.check_config(config)
  conditions.check(config, conditions.example(config, 4), 4)


def test_text_of_any_length_is_accepted():
  cond = draw()
  conditions.check(READS_TEXT, cond, 2)
  longer = {"text": jnp.zeros((2, 9, 4)), "pooled": cond["pooled"]}
  conditions.check(READS_TEXT, longer, 2)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(text=(2, 3, 6)), r"text has shape \(2, 3, 6\).*\(2, 3, 4\)"),
    (dict(text=(3, 3, 4)), r"text has shape \(3, 3, 4\); for 2 images"),
    (dict(text=(2, 4)), r"text has shape \(2, 4\)"),
    (dict(pooled=(2, 4)), r"pooled has shape \(2, 4\).*\(2, 5\)"),
    (dict(text_mask=(2, 2)), r"text_mask has shape \(2, 2\).*\(2, 3\)"),
  ],
)
def test_text_of_another_shape_is_refused(change, message):
  wrong = {key: jnp.zeros(shape) for key, shape in change.items()}
  with pytest.raises(ValueError, match=message):
    conditions.check(READS_TEXT, {**draw(negative=False), **wrong}, 2)
  same_in_negative = {**draw(), "negative": {**draw(negative=False), **wrong}}
  with pytest.raises(ValueError, match=f"negative {message}"):
    conditions.check(READS_TEXT, same_in_negative, 2)


def test_a_negative_text_must_have_the_keys_it_replaces():
  cond = {**draw(), "negative": draw(mask=False, negative=False)}
  with pytest.raises(ValueError, match="'negative'.*'text_mask'"):
    conditions.check(READS_TEXT, cond, 2)


def test_a_missing_condition_is_refused_and_named():
  with pytest.raises(ValueError, match=r"'text': .*num_classes=0.*\['label'\]"):
    conditions.check(READS_TEXT, {"label": jnp.zeros(2)}, 2)
  with pytest.raises(ValueError, match=r"'label': .*num_classes=7.*'text'\]"):
    conditions.check(READS_LABELS, draw(mask=False, negative=False), 2)
  with pytest.raises(ValueError, match=r"label has shape \(3,\); for 2 images"):
    conditions.check(READS_LABELS, {"label": jnp.zeros(3)}, 2)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(text_width=0), "text_width=0 must be positive"),
    (dict(label_tokens=-1), "label_tokens=-1 must be positive"),
    (dict(num_classes=-1), "num_classes=-1.*0 for a network that reads text"),
    (dict(condition_dropout=1.0), "condition_dropout=1.0.*below 1"),
    (dict(condition_dropout=-0.1), "condition_dropout=-0.1.*at least 0"),
  ],
)
def test_impossible_sizes_are_refused(change, message):
  config = types.SimpleNamespace(**{**vars(READS_TEXT), **change})
  with pytest.raises(ValueError, match=message):
    conditions.check_config(config)
