import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import config as config_lib
from flowjax.data import loader, sources


class Numbers:
  """Records that are known by their label; counts how often it is read."""

  name = "numbers"
  shape = (2, 3, 1)

  def __init__(self, count: int, salt: str = ""):
    self.class_names = tuple(map(str, range(count)))
    self.num_classes = count
    self.salt = salt
    self.reads = 0

  def __len__(self):
    return self.num_classes

  def __getitem__(self, i):
    assert 0 <= i < len(self)
    self.reads += 1
    ramp = np.arange(6, dtype=np.float32).reshape(2, 3, 1) / 6
    return {"image": ramp, "label": np.int32(i)}

  def fingerprint(self):
    return {"records": len(self), "hash": self.salt}


def labels(source, config, steps, **where) -> np.ndarray:
  batches = loader.batches(source, config, **where)
  return np.stack([b["label"] for b in itertools.islice(batches, steps)])


def test_each_epoch_is_a_permutation_of_its_own():
  config = config_lib.DataConfig(batch_size=5)
  epochs = labels(Numbers(20), config, 4 * 6).reshape(6, 20)

  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in epochs}) == 6
  assert tuple(range(20)) not in {tuple(epoch) for epoch in epochs}


def test_a_batch_may_span_epochs():
  config = config_lib.DataConfig(batch_size=8)
  stream = labels(Numbers(20), config, 10).ravel()
  for epoch in stream.reshape(4, 20):
    assert sorted(epoch) == list(range(20))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_batch_may_be_larger_than_the_source(count):
  config = config_lib.DataConfig(batch_size=16)
  stream = labels(Numbers(count), config, count).ravel()
  for epoch in stream.reshape(16, count):
    assert sorted(epoch) == list(range(count))


def test_the_seed_decides_the_order():
  orders = [
    tuple(labels(Numbers(50), config_lib.DataConfig(shuffle_seed=s), 1)[0])
    for s in (0, 1, 2, 0)
  ]
  assert orders[0] == orders[3] and len(set(orders)) == 3


def test_neighbouring_seeds_share_no_epoch():
  config = [
    config_lib.DataConfig(batch_size=50, shuffle_seed=s) for s in (0, 1)
  ]
  zero, one = (labels(Numbers(50), c, 20) for c in config)
  assert not set(map(tuple, zero)) & set(map(tuple, one))


@pytest.mark.parametrize("start", [1, 7, 40])
def test_any_step_can_be_the_first(start):
  config = config_lib.DataConfig(batch_size=6, flip=True)
  whole = loader.batches(Numbers(20), config)
  late = loader.batches(Numbers(20), config, start_step=start)
  for expected in itertools.islice(whole, start, start + 5):
    found = next(late)
    np.testing.assert_array_equal(found["label"], expected["label"])
    np.testing.assert_array_equal(found["image"], expected["image"])


def test_a_late_start_reads_nothing_before_it():
  source = Numbers(20)
  next(
    loader.batches(
      source, config_lib.DataConfig(batch_size=6), start_step=10**9
    )
  )
  assert source.reads == 6


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_all_processes_make_the_same_batches(count, spread):
  config = config_lib.DataConfig(batch_size=8, flip=True)
  whole = loader.batches(Numbers(21), config, start_step=3)
  each = 8 // count
  rows = [
    range(i, 8, count) if spread else range(i * each, (i + 1) * each)
    for i in range(count)
  ]
  parts = [
    loader.batches(Numbers(21), config, start_step=3, rows=mine)
    for mine in rows
  ]
  for _ in range(8):
    expected, found = next(whole), [next(part) for part in parts]
    for key in expected:
      assert len(found[0][key]) == 8 // count
      values = [f[key] for f in found]
      joined = np.stack(values, 1) if spread else np.stack(values)
      joined = joined.reshape(expected[key].shape)
      np.testing.assert_array_equal(joined, expected[key])


def test_a_source_in_memory_has_the_same_order_as_one_read_singly():
  config = config_lib.DataConfig(batch_size=32, flip=True)
  digits = sources.open(config, "train")
  assert hasattr(digits, "gather")

  class Singly:
    def __len__(self):
      return len(digits)

    def __getitem__(self, i):
      return digits[i]

  at_once, singly = (
    loader.batches(digits, config),
    loader.batches(Singly(), config),
  )
  for a, b in itertools.islice(zip(at_once, singly, strict=False), 4):
    assert set(b) - set(a) == {"skipped"} and not b["skipped"].any()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def test_half_of_the_images_are_mirrored_at_random():
  source = Numbers(10)
  plain = source[0]["image"]
  config = config_lib.DataConfig(batch_size=10, flip=True)
  batches = list(itertools.islice(loader.batches(source, config), 200))

  image_NHWC = np.concatenate([b["image"] for b in batches])
  flipped_N = (image_NHWC != plain).any((1, 2, 3))
  np.testing.assert_array_equal(image_NHWC[~flipped_N][0], plain)
  np.testing.assert_array_equal(image_NHWC[flipped_N][0], plain[:, ::-1])
  assert 0.45 < flipped_N.mean() < 0.55
  # Neither the place in the batch nor the record decides.
  assert (0.3 < flipped_N.reshape(200, 10).mean(0)).all()
  label_N = np.concatenate([b["label"] for b in batches])
  for record in range(10):
    assert 0.3 < flipped_N[label_N == record].mean() < 0.7


def test_nothing_is_mirrored_unless_it_is_asked_for():
  batch = next(loader.batches(Numbers(10), config_lib.DataConfig()))
  assert (batch["image"] == Numbers(1)[0]["image"]).all()


@pytest.mark.parametrize("count", [1, 2])
def test_an_epoch_of_batches_holds_every_record_once(count):
  parts = [
    list(
      loader.epoch_batches(
        Numbers(21), 8, rows=range(i * 8 // count, (i + 1) * 8 // count)
      )
    )
    for i in range(count)
  ]
  assert [len(part) for part in parts] == [3] * count
  for part in parts:
    assert all(b["image"].shape == (8 // count, 2, 3, 1) for b in part)
    assert all(b["mask"].dtype == np.float32 for b in part)
  rows = [np.concatenate([p[s]["label"] for p in parts]) for s in range(3)]
  mask = [np.concatenate([p[s]["mask"] for p in parts]) for s in range(3)]
  np.testing.assert_array_equal(np.concatenate(rows)[:21], np.arange(21))
  np.testing.assert_array_equal(np.concatenate(mask), [1] * 21 + [0] * 3)


def test_padding_keeps_the_structure_of_a_batch():
  first, last = loader.epoch_batches(Numbers(5), 4)
  for key in first:
    assert first[key].dtype == last[key].dtype
    assert first[key].shape == last[key].shape


def test_the_state_is_json_and_lets_the_same_data_go_on():
  config = config_lib.DataConfig()
  saved = json.loads(json.dumps(loader.state(config, 7)))

  assert saved["step"] == 7 and saved["fingerprint"]["records"] == 1438
  loader.check_state(saved, config)
  harmless = config_lib.DataConfig(workers=3, prefetch=5, on_corrupt="stop")
  loader.check_state(saved, harmless)
  loader.check_state(saved, config, sources.open(config, "train"))


@pytest.mark.parametrize(
  "change, row",
  [
    ({"shuffle_seed": 1}, "data.seed: 0 -> 1"),
    ({"batch_size": 64}, "data.batch_size: 128 -> 64"),
    ({"flip": True}, "data.flip: False -> True"),
    ({"held_out": 0.5}, "data.fingerprint.records: 1438 -> 899"),
  ],
)
def test_a_changed_order_is_refused_with_the_difference(change, row):
  saved = loader.state(config_lib.DataConfig(), 7)
  with pytest.raises(errors.DataError) as caught:
    loader.check_state(saved, config_lib.DataConfig(**change))
  assert row in str(caught.value) and "step 7" in str(caught.value)


def test_changed_files_are_refused():
  config = config_lib.DataConfig()
  saved = loader.state(config, 7, Numbers(9, "before"))
  loader.check_state(saved, config, Numbers(9, "before"))
  with pytest.raises(errors.DataError, match="hash: 'before' -> 'after'"):
    loader.check_state(saved, config, Numbers(9, "after"))


def test_importing_the_room_loads_nothing_heavy():
  code = (
    "import sys, flowjax.data, flowjax.data.loader, flowjax.data.sources\n"
    "heavy = {'grain', 'PIL', 'sklearn', 'tensorflow_datasets', 'jax'}\n"
    "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr
