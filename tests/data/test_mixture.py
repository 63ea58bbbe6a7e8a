"""Mixtures of sources, and captions made of labels."""

import dataclasses
import itertools
import json

import numpy as np
import PIL.Image
import pytest

from flowjax import errors, schema
from flowjax.commands import configs
from flowjax.data import config as config_lib
from flowjax.data import loader, mixture, order, sources, texts
from flowjax.train import experiment


class Numbers:
  """Records that say where they come from, in the words that are asked for."""

  shape = (1, 1, 1)

  def __init__(self, name: str, count: int, classes=()):
    self.name, self.count, self.class_names = name, count, classes
    self.num_classes = len(classes)

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    assert 0 <= i < self.count
    if i == 13:
      raise sources.Corrupt(f"{self.name} 13 is corrupt.")
    image = np.zeros(self.shape, np.float32)
    if self.num_classes:
      return {"image": image, "label": np.int32(i % self.num_classes)}
    return {"image": image, "caption": f"{self.name} {i}"}

  def fingerprint(self):
    return {"records": self.count, "hash": self.name}


def mixed(*weights, counts=(20, 30, 50)):
  parts = tuple(Numbers("abc"[k], counts[k]) for k in range(len(weights)))
  return mixture.Mixture(parts, mixture.slots_of(weights))


def owners(source, seed, position_B) -> np.ndarray:
  record_B = source.draw(seed, position_B)
  return np.searchsorted(source._ends, record_B, side="right")


@pytest.mark.parametrize("weights", [(0.7, 0.3), (3.0, 1.0, 2.0), (1.0, 9.5)])
@pytest.mark.parametrize("seed", [0, 3])
def test_any_long_stretch_holds_each_source_by_its_weight(weights, seed):
  source = mixed(*weights)
  position = np.arange(20_000)
  owner = owners(source, seed, position)
  share = np.array(weights) / sum(weights)
  for k in range(len(weights)):
    seen = np.cumsum(owner == k)
    for start, stop in itertools.combinations([0, 1, 777, 5000, 20_000], 2):
      count = seen[stop - 1] - (seen[start - 1] if start else 0)
      assert abs(count - share[k] * (stop - start)) <= len(weights)


def test_weights_are_taken_as_they_are_written():
  assert mixture.slots_of((0.7, 0.3)) == (7, 3)
  assert mixture.slots_of((2.0, 1.0)) == (2, 1)
  assert mixture.slots_of((0.25, 0.1, 1e-3)) == (250, 100, 1)
  with pytest.raises(errors.UserError, match="fewer digits, or as ratios"):
    mixture.slots_of((1 / 3, 0.667))
  for weight in (0.0, -1.0):
    with pytest.raises(errors.UserError, match="above 0"):
      mixture.slots_of((1.0, weight))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_each_source_has_epochs_of_its_own_without_repeats(seed):
  source = mixed(3.0, 1.0, 2.0)
  record = source.draw(seed, np.arange(3000))
  owner = np.searchsorted(source._ends, record, side="right")
  for k, part in enumerate(source.parts):
    own = record[owner == k]
    whole = own[: len(own) // len(part) * len(part)].reshape(-1, len(part))
    start = source._ends[k] - len(part)
    assert len(whole) >= 9
    for epoch in whole:
      assert sorted(epoch - start) == list(range(len(part)))
    assert len({tuple(epoch) for epoch in whole}) == len(whole)


def test_any_position_can_be_the_first_and_in_any_company():
  source = mixed(0.7, 0.3)
  position = np.random.default_rng(0).integers(0, 10**12, 64)
  whole = source.draw(7, position)
  single = [source.draw(7, p[None])[0] for p in position]
  np.testing.assert_array_equal(whole, single)
  assert (source.draw(8, position) != whole).any()


def test_two_sources_of_one_size_are_not_in_step():
  source = mixed(1.0, 1.0, counts=(40, 40))
  record = source.draw(0, np.arange(80))
  first, other = record[record < 40], record[record >= 40] - 40
  assert len(first) == len(other) == 40 and (first != other).any()


def test_the_loader_goes_on_from_any_step_and_skips_within_the_mixture():
  source = mixed(2.0, 1.0)
  config = config_lib.DataConfig(batch_size=6, shuffle_seed=3)
  whole = list(itertools.islice(loader.batches(source, config), 12))
  late = loader.batches(source, config, start_step=9, rows=[1, 4])
  for batch in whole[9:]:
    expected = batch["caption"][[1, 4]].tolist()
    assert next(late)["caption"].tolist() == expected
  captions = [c for batch in whole for c in batch["caption"]]
  assert "a 13" not in captions and sum(b["skipped"].sum() for b in whole) >= 2
  said = {c[0] for c in captions}
  assert said == {"a", "b"}


def test_an_evaluation_sees_each_record_of_each_source_once():
  source = mixed(5.0, 1.0, counts=(5, 7))
  batches = loader.epoch_batches(source, 4)
  seen = [c for b in batches for c in b["caption"].tolist()]
  assert seen == [f"a {i}" for i in range(5)] + [f"b {i}" for i in range(7)]


def digits(**changes):
  return config_lib.DataConfig(**({"held_out": 0.2} | changes))


def test_templates_make_captions_of_labels_by_seed_and_position():
  templates = ("a {}", "the digit {}", "{}, written")
  config = digits(templates=templates, batch_size=500)
  source = sources.open(config, "train")
  plain = sources.open(digits(), "train")
  assert source.num_classes == 0 and len(source) == len(plain)
  assert source[3]["caption"] == f"a {plain[3]['label']}"
  for k, template in enumerate(templates):
    record = source[3 + k * len(source)]
    assert record["caption"] == template.format(plain[3]["label"])
    np.testing.assert_array_equal(record["image"], plain[3]["image"])

  record = source.draw(0, np.arange(3000))
  which = record // len(source)
  assert (np.bincount(which, minlength=3) > 900).all()
  expected = order.records(0, len(plain), np.arange(3000))
  np.testing.assert_array_equal(record % len(source), expected)
  assert (which != source.draw(1, np.arange(3000)) // len(source)).any()
  # The same image in several words, over the epochs.
  later = source.draw(0, np.arange(len(source) * 8))
  assert len(set(later[later % len(source) == 0] // len(source))) > 1

  batch = next(loader.batches(source, config))
  labels = next(loader.batches(plain, digits(batch_size=500)))["label"]
  for caption, label in zip(batch["caption"], labels, strict=True):
    assert caption in [template.format(label) for template in templates]
  assert source.fingerprint()["templates"] == list(templates)
  assert len(list(loader.epoch_batches(source, 512))) == 3


def test_a_name_of_several_words_is_written_as_words():
  labelled = Numbers("birds", 4, ("house_finch", "café"))
  source = texts.Templated(labelled, ("a photo of a {}",))
  assert source[0]["caption"] == "a photo of a house finch"
  assert source[1]["caption"] == "a photo of a café"


@pytest.mark.parametrize("template", ["no place", "{} and {}", "{name}", "{}}"])
def test_a_template_has_one_place_for_the_name(template):
  with pytest.raises(errors.UserError, match="config.data: templates"):
    schema.build(
      config_lib.DataConfig, {"templates": (template,)}, "config.data"
    )


# Mixtures by config.


@pytest.fixture
def folder(tmp_path):
  for name, text in (("x", "eins"), ("y", "zwei")):
    np.save(tmp_path / f"{name}.npy", np.zeros((8, 8, 4), np.float32))
    (tmp_path / f"{name}.txt").write_text(text)
  return tmp_path


def test_a_config_mixes_captioned_and_templated_sources(folder, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  for root, names in ((one, ("a", "b")), (two, ("c", "d", "e"))):
    root.mkdir()
    for name in names:
      np.save(root / f"{name}.npy", np.zeros((8, 8, 4), np.float32))
      (root / f"{name}.txt").write_text(name)
  pairs = ((f"folder:{one}", 2.0), (f"folder:{two}", 1.0))
  values = {
    "source": "mixture",
    "mixture": pairs,
    "channels": 4,
    "held_out": 0.0,
    "batch_size": 9,
  }
  config = schema.build(config_lib.DataConfig, values, "config.data")
  source = sources.open(config, "train")
  assert source.name == "folder:one + folder:two" and len(source) == 5
  batch = next(loader.batches(source, config))
  assert sum(c in "ab" for c in batch["caption"]) == 6

  saved = json.loads(json.dumps(loader.state(config, 3, source)))
  loader.check_state(saved, config, source)
  heavier = schema.build(
    config_lib.DataConfig,
    {**values, "mixture": [[name, 1.0] for name, _ in pairs]},
    "config.data",
  )
  with pytest.raises(errors.DataError, match="slots: 2 -> 1"):
    loader.check_state(saved, heavier)
  # As JSON of a workdir has it, it is the same config.
  again = json.loads(json.dumps(schema.to_dict(config)))
  assert schema.build(config_lib.DataConfig, again, "config.data") == config


def test_a_mixture_is_read_as_tokens_in_its_own_order():
  pairs = (("scenes", 1.0), ("digits", 3.0))
  config = config_lib.DataConfig(
    source="mixture",
    mixture=pairs,
    templates=("a {}",),
    image_size=(32, 32),
    channels=3,
    batch_size=16,
    tokenizer="bytes",
    tokens=24,
  )
  source = sources.open(config, "train")
  batch = next(loader.batches(source, config))
  assert batch["token"].shape == (16, 24) and "caption" not in batch
  short = batch["token_mask"].sum(1) <= 5  # Those of digits: "a 7".
  assert short.sum() == 12
  model = {"num_classes": 0, "channels": 3, "image_size": (32, 32)}
  sources.check(source, **model, batch_size=16)

  config = dataclasses.replace(config, tokenizer=None)
  raw = sources.open(config, "train")
  with pytest.raises(errors.UserError, match="nothing makes tokens"):
    sources.check(raw, **model, batch_size=16)


def test_a_mixture_can_be_paired_with_a_source(tmp_path):
  for i in range(3):
    (tmp_path / "a").mkdir(exist_ok=True)
    image = PIL.Image.fromarray(np.zeros((8, 8), np.uint8))
    image.save(tmp_path / f"a/{i}.png")
  config = config_lib.DataConfig(
    source="mixture",
    mixture=(("digits", 1.0),),
    pair_source=f"folder:{tmp_path}",
    held_out=0.0,
    batch_size=4,
  )
  batch = next(loader.batches(sources.open(config, "train"), config))
  assert batch["label"].shape == (4,) and (batch["source"] == -1.0).all()


def test_labels_mix_with_captions_only_by_templates(folder):
  pairs = ((f"folder:{folder}", 1.0), ("digits", 1.0))
  values = {"source": "mixture", "mixture": pairs, "held_out": 0.0}
  values |= {"image_size": (8, 8), "channels": 1}
  for name in ("x", "y"):
    (folder / f"{name}.npy").unlink()
  for name in ("x", "y"):
    image = PIL.Image.fromarray(np.zeros((8, 8), np.uint8))
    image.save(folder / f"{name}.png")
  with pytest.raises(errors.DataError, match="do not mix.*templates"):
    sources.open(config_lib.DataConfig(**values), "train")
  config = config_lib.DataConfig(**values, templates=("a {}",), batch_size=4)
  batch = next(loader.batches(sources.open(config, "train"), config))
  assert sum(c in ("eins", "zwei") for c in batch["caption"].tolist()) == 2


@pytest.mark.parametrize(
  "pairs, text",
  [
    ((("digits", 1.0), ("digits", 2.0)), "twice"),
    ((("mixture", 1.0),), "within itself"),
    ((("digits", 0.0),), "above 0"),
    ((("digitz", 1.0),), "Did you mean 'digits'"),
  ],
)
def test_a_mixture_that_cannot_be_is_refused(pairs, text):
  config = config_lib.DataConfig(source="mixture", mixture=pairs)
  with pytest.raises(errors.UserError, match=text):
    sources.open(config, "train")


@pytest.mark.parametrize(
  "values",
  [
    {"source": "mixture"},
    {"mixture": (("digits", 1.0),)},
    {"on_no_caption": "ignore"},
    {"max_pixels": 0},
    {"max_pixels": 10**9},
  ],
)
def test_an_impossible_config_is_refused(values):
  key = "mixture" if "source" in values else next(iter(values))
  with pytest.raises(errors.UserError, match=f"config.data: .*{key}="):
    schema.build(config_lib.DataConfig, values, "config.data")


def test_a_command_line_can_name_a_mixture_and_what_is_none_by_default():
  config = experiment.defaults("dit")
  words = [
    "--config.data.source=mixture",
    "--config.data.mixture=(('folder:x', 1), ('digits', 2.5))",
    "--config.data.templates=('a {}',)",
    "--config.data.captions=True",
    "--config.data.caption_key=said",
    "--config.model.image_size=(8, 8)",
    "--config.model.channels=1",
  ]
  data = configs.overridden(config, words, "test").data
  assert data.mixture == (("folder:x", 1.0), ("digits", 2.5))
  assert data.templates == ("a {}",)
  assert data.captions is True and data.caption_key == "said"


def test_a_blank_of_templates_has_what_their_records_have():
  class Sized:
    name, shape, class_names, num_classes = "sized", (2, 2, 1), ("a",), 1
    record = {
      "image": np.zeros((2, 2, 1), np.float32),
      "label": np.int32(0),
      "size": np.array([4, 4], np.int32),
    }
    blank = record

    def __len__(self):
      return 1

    def __getitem__(self, i):
      return self.record

  source = texts.Templated(Sized(), ("a {}",))
  assert sources.blank(source).keys() == source[0].keys()
