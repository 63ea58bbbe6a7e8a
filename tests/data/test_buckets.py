"""Aspect buckets: which image is where, and which bucket a step has."""

import collections
import dataclasses
import itertools
import json
import logging
import math
import pickle

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import buckets, loader, mixture, order, sources
from flowjax.data import config as config_lib

THREE = ((8, 8), (6, 10), (10, 6))


@dataclasses.dataclass(frozen=True)
class Sized:
  """Records that are known by their label, of originals of these sizes."""

  size_N2: np.ndarray
  shape: tuple[int, int, int] = (8, 8, 1)
  name: str = "sized"
  num_classes: int = 10**6
  class_names: tuple[str, ...] = ()
  corrupt: int = -1

  def sizes(self):
    return np.array(self.size_N2)

  def cut(self, image_size):
    return dataclasses.replace(self, shape=(*image_size, 1))

  def __len__(self):
    return len(self.size_N2)

  def __getitem__(self, i):
    if i == self.corrupt:
      raise sources.Corrupt(f"{i} is corrupt.")
    ramp = np.linspace(0, 1, math.prod(self.shape), dtype=np.float32)
    return {"image": ramp.reshape(self.shape), "label": np.int32(i)}

  def fingerprint(self):
    return {"records": len(self)}


def config_of(**changes) -> config_lib.DataConfig:
  return config_lib.DataConfig(**{"buckets": THREE, "batch_size": 5, **changes})


def sized(square: int, wide: int, tall: int, **changes) -> Sized:
  size = [(50, 50)] * square + [(30, 70)] * wide + [(70, 40)] * tall
  mixed = np.random.default_rng(0).permutation(len(size))
  return Sized(np.array(size)[mixed], **changes)


def divided(*counts, split="train", config=None, **changes):
  return buckets.divide(sized(*counts, **changes), config or config_of(), split)


def batches(source, config, steps, **where):
  return list(itertools.islice(loader.batches(source, config, **where), steps))


def test_the_nearest_bucket_is_that_which_crops_least():
  rng = np.random.default_rng(0)
  size_N2 = rng.integers(1, 500, (300, 2))
  for some in (THREE, buckets.of_area(256**2, 16), ((4, 9), (5, 5), (11, 3))):
    found_N = buckets.nearest(size_N2, some)
    for (height, width), found in zip(size_N2, found_N, strict=True):
      left = []
      for high, wide in some:
        scale = min(height / high, width / wide)
        left.append(high * wide * scale**2 / (height * width))
      assert left[found] == pytest.approx(max(left))
  # On its side an image goes to the bucket that lies on its side.
  turned_N = buckets.nearest(size_N2[:, ::-1], [(w, h) for h, w in THREE])
  np.testing.assert_array_equal(turned_N, buckets.nearest(size_N2, THREE))


def test_buckets_of_an_area_are_about_as_large():
  made = buckets.of_area(512 * 512, 16)
  assert made[:3] == ((512, 512), (576, 464), (464, 576)) and len(made) == 11
  config_of(buckets=made, image_size=(512, 512))
  for height, width in made:
    assert height % 16 == width % 16 == 0
    assert abs(height * width / 512**2 - 1) < 0.04
  # Coarse ones become one, which a config then takes.
  coarse = buckets.of_area(64, 4)
  assert len(coarse) < 11
  config_of(buckets=coarse)


@pytest.mark.slow
@pytest.mark.parametrize("side, divisor", [(512, 16), (1024, 16), (1024, 64)])
def test_they_are_those_of_diffusers(side, divisor):
  theirs = pytest.importorskip("diffusers.training_utils")
  made = buckets.of_area(side**2, divisor)
  assert set(made) == set(
    theirs.generate_aspect_ratio_buckets(side, divisibility=divisor)
  )
  # Where areas are equal, so is the choice; about equal, nearly always.
  size_N2 = np.random.default_rng(0).integers(100, 3000, (2000, 2))
  asked_N = [theirs.find_nearest_bucket(h, w, made) for h, w in size_N2]
  assert np.mean(buckets.nearest(size_N2, made) == asked_N) > 0.97


def test_each_batch_is_of_one_bucket_and_each_image_in_its_own():
  source, config = divided(20, 15, 10), config_of()
  assert [part.shape[:2] for part in source.parts] == list(THREE)
  assert source.shape == (8, 8, 1) and len(source) == 45
  sizes = sized(20, 15, 10).size_N2
  shown = collections.Counter()
  for batch in batches(source, config, 60):
    shape = batch["image"].shape
    assert len(shape) == 4 and shape[0] == 5
    wanted_B = buckets.nearest(sizes[batch["label"]], THREE)
    assert {THREE[k] for k in wanted_B} == {shape[1:3]}
    shown[shape[1:3]] += 1
  assert set(shown) == set(THREE)


def test_each_bucket_has_its_share_and_shows_all_before_it_repeats():
  source, config = divided(20, 15, 10), config_of(flip=True)
  assert sum(source._shares) == 144 and source._shares == (64, 48, 32)
  streams = collections.defaultdict(list)
  for batch in batches(source, config, 2 * 144):
    streams[batch["image"].shape[1:3]] += batch["label"].tolist()
  for part in source.parts:
    stream = np.array(streams[part.shape[:2]])
    # 288 steps of 5, of 45 images: each comes 32 times.
    for epoch in stream.reshape(32, len(part)):
      assert sorted(epoch) == sorted(part.row_N)


@pytest.mark.parametrize("counts", [(900, 50, 7), (1, 10**7, 1), (5,), (3, 3)])
def test_shares_are_as_the_counts_and_the_cycle_is_a_permutation(counts):
  shares = order.shares(counts)
  assert sum(shares) <= order._MOST_TURNS + len(counts)
  if min(counts) > 5:
    for count, share in zip(counts, shares, strict=True):
      wanted = count / sum(counts)
      assert abs(share / sum(shares) / wanted - 1) < 1 / 32
  if sum(shares) > 10**5:
    return
  for cycle in range(2):
    steps = range(cycle * sum(shares), (cycle + 1) * sum(shares))
    turns = [order.turn(7, shares, step) for step in steps]
    for k, share in enumerate(shares):
      own = [turn for owner, turn in turns if owner == k]
      # In their order, so that a bucket's neighbours stay neighbours.
      assert own == list(range(cycle * share, (cycle + 1) * share))


def test_shares_are_rounded_by_largest_remainder():
  # Of 160 turns 74.67, 53.33 and 32.
  assert order.shares((7, 5, 3)) == (75, 53, 32)


def test_no_two_buckets_have_one_order():
  source, streams = divided(20, 20, 20), collections.defaultdict(list)
  for batch in batches(source, config_of(), 90):
    rows = {part.shape[:2]: part.row_N.tolist() for part in source.parts}
    size = batch["image"].shape[1:3]
    streams[size] += map(rows[size].index, batch["label"].tolist())
  firsts = {tuple(stream[:40]) for stream in streams.values()}
  assert len(firsts) == 3


def test_the_turns_outlive_a_version():
  """A checkpoint continues an order: these numbers may never change."""
  owners = [order.turn(0, (2, 3, 1), step)[0] for step in range(12)]
  assert owners == [1, 0, 1, 0, 1, 2, 0, 1, 1, 2, 1, 0]
  assert order.apart(5, 0) == 5
  assert order.apart(0, 1) == 14135772400868000056


@pytest.mark.parametrize("start", [1, 17, 143, 145, 1000])
def test_any_step_can_be_the_first_for_any_number_of_processes(start):
  config = config_of(batch_size=6, flip=True)
  source = divided(20, 15, 10, config=config, corrupt=3)
  late = batches(source, config, 4, start_step=start)
  order._cycle.cache_clear()
  whole = loader.batches(source, config)
  parts = [
    batches(source, config, 4, start_step=start, rows=range(i, i + 2))
    for i in (0, 2, 4)
  ]
  for i, expected in enumerate(itertools.islice(whole, start, start + 4)):
    for key, value in expected.items():
      np.testing.assert_array_equal(late[i][key], value)
      joined = np.concatenate([part[i][key] for part in parts])
      np.testing.assert_array_equal(joined, value)


@pytest.mark.slow
def test_workers_change_nothing():
  config = config_lib.DataConfig(
    source="scenes", image_size=(32, 32), channels=3, batch_size=3,
    buckets=((32, 32), (32, 48)), tokenizer="bytes", tokens=8,
  )  # fmt: skip
  source = sources.open(config, "train")
  other = dataclasses.replace(config, workers=2)
  pairs = zip(
    batches(source, config, 5), batches(source, other, 5), strict=True
  )
  for one, two in pairs:
    for key in one:
      np.testing.assert_array_equal(one[key], two[key])


def test_the_seed_decides_which_bucket_comes_when():
  source = divided(20, 15, 10)
  shapes = [
    [
      batch["image"].shape
      for batch in batches(source, config_of(shuffle_seed=seed), 30)
    ]
    for seed in (0, 1, 0)
  ]
  assert shapes[0] == shapes[2] != shapes[1]


def test_a_bucket_of_less_than_a_batch_goes_into_the_nearest(caplog):
  caplog.set_level(logging.INFO)
  source = divided(20, 4, 10)
  assert [part.shape[:2] for part in source.parts] == [(8, 8), (10, 6)]
  assert [len(part) for part in source.parts] == [24, 10]
  assert "8x8: 20, 6x10: 4, 10x6: 10" in caplog.text
  (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
  for said in ("4 images", "6x10", "batch of 5", "8x8, which has 20"):
    assert said in warning.getMessage()
  # Held-out ones are measured as they are; no bucket is of nobody.
  held = divided(20, 4, 0, split="held_out")
  assert [len(part) for part in held.parts] == [20, 4]
  # The reference is what the network is made for, with or without images.
  wide = divided(1, 20, 0)
  assert [part.shape[:2] for part in wide.parts] == [(6, 10)]
  assert wide.shape == wide.blank["image"].shape == (8, 8, 1)
  assert buckets.reference(wide) is wide.parts[0]
  assert buckets.reference(source) is source.parts[0]


def test_merging_follows_the_nearest_that_is_left():
  four = ((8, 8), (7, 9), (6, 10), (4, 16))
  assert buckets.merged([9, 9, 9, 1], four, 5) == [0, 1, 2, 2]
  assert buckets.merged([9, 3, 1, 2], four, 5) == [0, 1, 1, 1]
  assert buckets.merged([9, 9, 0, 0], four, 1) == [0, 1, 1, 1]
  assert buckets.merged([1, 1, 1, 1], four, 9) == [1, 1, 1, 1]


def test_an_evaluation_sees_every_image_once_in_batches_of_one_bucket():
  source = divided(7, 6, 5, corrupt=4)
  seen, sizes = [], sized(7, 6, 5).size_N2
  for batch in loader.epoch_batches(source, 4):
    real = batch["mask"] == 1
    wanted = buckets.nearest(sizes[batch["label"][real]], THREE)
    assert {THREE[k] for k in wanted} <= {batch["image"].shape[1:3]}
    seen += batch["label"][real].tolist()
  assert sorted(seen) == [i for i in range(18) if i != 4]
  parts = [
    list(loader.epoch_batches(source, 4, rows=rows))
    for rows in (range(2), range(2, 4))
  ]
  assert len(parts[0]) == len(parts[1]) == 6


def test_a_checkpoint_names_the_bucket_that_changed():
  source, config = divided(20, 15, 10), config_of()
  saved = json.loads(json.dumps(loader.state(config, 3, source)))
  loader.check_state(saved, config, pickle.loads(pickle.dumps(source)))
  with pytest.raises(errors.DataError, match="buckets.6x10.records: 15 -> 16"):
    loader.check_state(saved, config, divided(19, 16, 10))
  # As many in each, but others.
  turned = Sized(sized(20, 15, 10).size_N2[::-1])
  other = buckets.divide(turned, config, "train")
  with pytest.raises(errors.DataError, match="buckets.8x8.rows"):
    loader.check_state(saved, config, other)
  with pytest.raises(errors.DataError, match="fingerprint.buckets"):
    loader.check_state(saved, config_of(buckets=()), sized(20, 15, 10))


def test_pairs_are_of_one_bucket(caplog):
  pair = buckets.paired(divided(20, 15, 10), divided(6, 7, 8))
  config = config_of()
  for batch in batches(pair, config, 20):
    assert batch["source"].shape == batch["image"].shape
  assert pair.blank["source"].shape == (8, 8, 1)
  with pytest.raises(errors.DataError, match="6x10.* has 15"):
    buckets.paired(divided(20, 15, 10), divided(6, 0, 8))
  assert "left out" not in caplog.text
  assert len(buckets.paired(divided(20, 0, 10), divided(6, 7, 8)).parts) == 2
  assert "7 images of" in caplog.text and "nearest to 6x10" in caplog.text


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"buckets": ((8, 8), (0, 9))}, "both positive"),
    ({"buckets": ((6, 10), (10, 6))}, "must be one of the buckets"),
    ({"buckets": ((8, 8), (6, 6))}, "of one aspect"),
    ({"buckets": ((8, 8), (8, 8))}, "of one aspect"),
    ({"buckets": ((8, 8), (8, 17))}, "2.12 times the area of .8, 8."),
  ],
)
def test_impossible_buckets_are_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    config_of(**changes)


def test_a_source_that_cannot_is_refused():
  with pytest.raises(errors.UserError, match="digits does not say how large"):
    sources.open(config_of(), "train")


def test_a_mixture_has_each_source_by_its_weight_in_buckets_of_its_own():
  one, two = divided(20, 15, 10, name="one"), divided(90, 0, 10, name="two")
  mixed = mixture._by_bucket([one, two], (3, 1))
  assert mixed.name == "one + two" and len(mixed) == 145
  assert [len(part) for part in mixed.parts] == [110, 15, 20]
  config, cycle = config_of(), sum(mixed.shares)
  shown: collections.Counter = collections.Counter()
  for step in range(cycle):
    part, seed, own = mixed.turn(0, step)
    drawn = part.draw(seed, own * 5 + np.arange(5))
    owner = np.searchsorted(part._ends, drawn, side="right")
    for k in owner:
      shown[part.shape[:2], part.parts[k].name] += 1
  total = sum(shown.values())
  for name, weight, counts in (
    ("one", 3 / 4, (20, 15, 10)), ("two", 1 / 4, (90, 0, 10))
  ):  # fmt: skip
    for size, count in zip(THREE, counts, strict=True):
      wanted = weight * count / sum(counts)
      assert shown[size, name] / total == pytest.approx(wanted, rel=0.07)
  for batch in batches(mixed, config, 9):
    assert batch["image"].shape[1:3] in THREE
  seen = [
    batch["label"][batch["mask"] == 1]
    for batch in loader.epoch_batches(mixed, 8)
  ]
  assert len(np.concatenate(seen)) == 145
  json.dumps(mixed.fingerprint())


def test_mixed_scenes_are_opened_in_buckets():
  config = config_lib.DataConfig(
    source="mixture", mixture=(("scenes", 1.0),), channels=3, tokenizer="bytes",
    image_size=(32, 32), buckets=((32, 32), (32, 48)), batch_size=4,
  )  # fmt: skip
  source = sources.open(config, "train")
  shapes = {batch["image"].shape for batch in batches(source, config, 16)}
  assert shapes == {(4, 32, 32, 3), (4, 32, 48, 3)}


def test_scenes_run_in_buckets_with_their_captions():
  config = config_lib.DataConfig(
    source="scenes", image_size=(32, 32), channels=3, batch_size=4,
    buckets=((32, 32), (32, 48), (48, 40)), tokenizer="bytes", tokens=24,
  )  # fmt: skip
  source = sources.open(config, "train")
  assert [part.shape for part in source.parts] == [
    (32, 32, 3), (32, 48, 3), (48, 40, 3)
  ]  # fmt: skip
  plain = sources.open(
    dataclasses.replace(config, buckets=(), tokenizer=None), "train"
  )
  shapes = set()
  for batch in batches(source, config, 12):
    shapes.add(batch["image"].shape)
    assert batch["token"].shape == (4, 24)
  assert len(shapes) == 3
  for k, part in enumerate(source.parts):
    for i in range(40):
      scene = part.source.source.scene(3 * i + k)
      # What is said is the same, and the digits stand within the picture.
      assert scene.caption == plain.scene(3 * i + k).caption
      image_HWC = part.source[i]["image"]
      assert image_HWC.shape == part.shape and image_HWC.max() <= 1.0 + 1e-6
      for thing in scene.things:
        assert 7 <= thing.row <= part.shape[0] - 7
        assert 7 <= thing.column <= part.shape[1] - 7
  with pytest.raises(errors.UserError, match="sides are at least 32"):
    sources.open(
      dataclasses.replace(config, buckets=((32, 32), (28, 40))), "train"
    )
