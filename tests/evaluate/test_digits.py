"""The judge of digits is a good one, and sees what is wrong with samples."""

import numpy as np
import pytest

from flowjax import errors
from flowjax.data import config, sources
from flowjax.evaluate import classifier, digits

pytestmark = [pytest.mark.usefixtures("fitted_once"), pytest.mark.slow(1)]

pytest.importorskip("sklearn")


def _split(name, size=(8, 8)):
  source = sources.open(config.DataConfig(image_size=size), name)
  records = [source[i] for i in range(len(source))]
  images = np.stack([record["image"] for record in records])
  return images, np.array([record["label"] for record in records])


@pytest.fixture(scope="module")
def train():
  return _split("train")


@pytest.fixture(scope="module")
def held_out():
  return _split("held_out")


@pytest.fixture(scope="module")
def judge(train, held_out):
  return digits.Digits(*train, *held_out, seed=0)


@pytest.mark.slow
def test_it_knows_digits_that_it_never_saw(judge):
  assert judge.accuracy >= 0.975


@pytest.mark.slow
def test_another_seed_judges_alike(judge, train, held_out):
  other = digits.Digits(*train, *held_out, seed=1)
  assert other.accuracy >= 0.975
  assert other.frechet_real != judge.frechet_real
  # Another seed measures alike, within a third.
  assert other.frechet_real == pytest.approx(judge.frechet_real, rel=0.33)


def test_real_digits_as_samples(judge, train, held_out):
  scores = judge.score(*held_out)
  assert scores["sample_accuracy"] == judge.accuracy
  assert scores["frechet"] == pytest.approx(0.0, abs=1e-6)
  assert scores["nearest_neighbour"]["copies"] == 0.0
  assert scores["nearest_neighbour"]["closer"] == pytest.approx(0.01, abs=0.005)
  by_class = scores["accuracy_by_class"]
  assert sorted(by_class) == list("0123456789")
  weights = np.bincount(held_out[1]) / len(held_out[1])
  mean = sum(weights[int(k)] * value for k, value in by_class.items())
  assert mean == pytest.approx(judge.accuracy)
  assert judge.score(*train)["frechet"] == pytest.approx(judge.frechet_real)


def test_copies_of_the_training_images_show(judge, train):
  images, labels = train
  near = np.clip(images + 0.02, -1.0, 1.0)  # Less than half a level.
  found = judge.score(near[:200], labels[:200])["nearest_neighbour"]
  assert found["copies"] == 1.0 and found["closer"] == 1.0
  assert found["samples_mean"] == 0.0 < found["held_out_min"]


def test_wrong_labels_and_noise_score_badly(judge, held_out):
  images, labels = held_out
  assert judge.score(images, (labels + 1) % 10)["sample_accuracy"] < 0.02
  noise = np.random.default_rng(0).normal(size=(500, 8, 8, 1))
  scores = judge.score(noise, np.arange(500) % 10)
  assert scores["sample_accuracy"] < 0.25
  assert scores["frechet"] > 10.0 * judge.frechet_real


def test_one_confused_class_shows_in_that_class(judge, held_out):
  images, labels = held_out[0].copy(), held_out[1]
  images[labels == 3] = images[np.flatnonzero(labels == 0)[0]]
  by_class = judge.score(images, labels)["accuracy_by_class"]
  assert (
    by_class["3"] == 0.0
    and min(value for key, value in by_class.items() if key != "3") > 0.9
  )


def test_the_distance_sees_noise_and_missing_variety(judge, train):
  images, labels = train
  rng = np.random.default_rng(0)

  def noisy(sigma):
    samples = images + sigma * rng.normal(size=images.shape)
    return judge.score(samples, labels)["frechet"]

  assert judge.frechet_real < noisy(0.1) < noisy(0.2) < noisy(0.4)
  assert noisy(0.3) > 2.0 * judge.frechet_real
  # Ten recognisable images, repeated: accuracy is blind to it.
  first = [int(np.flatnonzero(labels == label)[0]) for label in range(10)]
  scores = judge.score(
    np.repeat(images[first], 50, axis=0), np.repeat(range(10), 50)
  )
  assert scores["sample_accuracy"] == 1.0
  assert scores["frechet"] > 5.0 * judge.frechet_real


def test_samples_are_scored_as_they_would_be_stored(judge, train, held_out):
  images, labels = train
  assert judge.levels == 17
  np.testing.assert_allclose(judge.stored(images), images, atol=1e-6)
  stored = judge.stored(np.array([-7.0, -0.99, 0.06, 0.07, 2.0]))
  np.testing.assert_allclose(stored, [-1.0, -1.0, 0.0, 0.125, 1.0])
  # What the rounding takes away changes no score.
  a = judge.score(images[:300] + 0.05, labels[:300])
  b = judge.score(images[:300], labels[:300])
  assert a == b


def test_samples_that_are_not_finite_are_an_error(judge):
  samples = np.zeros((2, 8, 8, 1))
  samples[1, 3, 3] = np.nan
  with pytest.raises(errors.NumericError, match="not finite"):
    judge.score(samples, np.zeros(2, int))


def test_an_empty_split_is_an_error(train):
  images, labels = train
  with pytest.raises(errors.DataError, match="held-out"):
    digits.Digits(images, labels, images[:0], labels[:0])


@pytest.mark.slow
def test_enlarged_digits_are_judged_too(monkeypatch):
  monkeypatch.setattr(classifier, "STEPS", 500)
  judge = digits.Digits(
    *_split("train", (16, 16)), *_split("held_out", (16, 16))
  )
  assert judge.levels == 256
  assert judge.accuracy >= 0.96


def test_the_number_of_classes_is_that_of_those_that_come(judge, held_out):
  images, labels = held_out
  few = judge.spread(images[np.isin(labels, (0, 4, 6))])
  assert few["classes"] == pytest.approx(3.0, abs=0.3)
  every = judge.spread(images)
  assert every["classes"] == pytest.approx(10.0, abs=0.1)
  assert few["frechet"] > every["frechet"] == pytest.approx(0.0, abs=1e-6)


def test_what_became_of_digits_is_held_against_the_others(judge, held_out):
  images, labels = held_out
  low, high = images[labels < 5][:150], images[labels >= 5][:150]
  moved = judge.translation(high, low, high, np.arange(5, 10))
  assert moved["samples_recognised"] > 0.95 > 0.05 > moved["sources_recognised"]
  assert moved["samples_frechet"] < 1e-6 < 50 < moved["sources_frechet"]
  stayed = judge.translation(low, low, high, np.arange(5, 10))
  assert stayed["moved"] == 0.0 and moved["moved"] > 0.3
  assert stayed["samples_recognised"] == moved["sources_recognised"]
