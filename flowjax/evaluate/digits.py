"""Scores of generated digits, by a classifier that has seen real ones.

All images are scored as the data set stores them: clipped to [-1, 1] and
rounded to the levels of the training images, which for 8x8 digits are 17. So
has every Fréchet distance been measured since FID, whose images are rounded to
the 256 levels of theirs. Real images are not changed by it.
"""

# Shape suffixes: N images, H height, W width, C channels, K classes.

from typing import Any

import numpy as np

from flowjax import errors
from flowjax.evaluate import classifier, distances


class Digits:
  """A judge: fitted on training images, itself judged on held-out ones.

  `accuracy` is that of its classifier on the held-out images; `frechet_real`
  the Fréchet distance in its features between training and held-out images.
  """

  def __init__(
    self,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    held_out_images: np.ndarray,
    held_out_labels: np.ndarray,
    seed: int = 0,
  ):
    for name, labels in (
      ("training", train_labels),
      ("held-out", held_out_labels),
    ):
      if len(labels) < 2:
        raise errors.DataError(
          f"The {name} split has {len(labels)} images, too few to judge by."
        )
    self.classes = int(np.max(train_labels)) + 1
    self.levels = _levels(train_images)
    self._train = self.stored(train_images)
    self._held_out = self.stored(held_out_images)
    self.classifier = classifier.fit(
      self._train, train_labels, classes=self.classes, seed=seed
    )
    predicted = self.classifier.predict(self._held_out)
    self.accuracy = float(np.mean(predicted == held_out_labels))
    self._held_out_features = self.classifier.features(self._held_out)
    self.frechet_real = distances.frechet(
      self.classifier.features(self._train), self._held_out_features
    )
    self._real_distances, _ = distances.nearest(self._held_out, self._train)

  def stored(self, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns images as the data set stores them."""
    steps = self.levels - 1
    clipped_NHWC = np.clip(np.asarray(images_NHWC, np.float32), -1.0, 1.0)
    return np.round((clipped_NHWC + 1.0) / 2.0 * steps) / steps * 2.0 - 1.0

  def score(
    self, samples_NHWC: np.ndarray, labels_N: np.ndarray
  ) -> dict[str, Any]:
    """Scores samples that were asked to be of the classes `labels_N`."""
    stored_NHWC = self._sound(samples_NHWC)
    right_N = self.classifier.predict(stored_NHWC) == labels_N
    by_class = {
      str(label): float(np.mean(right_N[labels_N == label]))
      for label in np.unique(labels_N)
    }
    return {
      "sample_accuracy": float(np.mean(right_N)),
      "accuracy_by_class": by_class,
      "frechet": distances.frechet(
        self.classifier.features(stored_NHWC), self._held_out_features
      ),
      "nearest_neighbour": self.nearest_neighbour(stored_NHWC),
    }

  def spread(self, samples_NHWC: np.ndarray) -> dict[str, Any]:
    """Scores samples that were asked to be of no class.

    `classes` is exp(H) of the classes that they are recognised as, H their
    entropy: the number of classes where all come equally often.
    """
    stored_NHWC = self._sound(samples_NHWC)
    predicted_N = self.classifier.predict(stored_NHWC)
    count_K = np.bincount(predicted_N, minlength=self.classes)
    share_K = count_K[count_K > 0] / len(predicted_N)
    return {
      "classes": float(np.exp(-np.sum(share_K * np.log(share_K)))),
      "frechet": distances.frechet(
        self.classifier.features(stored_NHWC), self._held_out_features
      ),
      "nearest_neighbour": self.nearest_neighbour(stored_NHWC),
    }

  def translation(
    self,
    samples_NHWC: np.ndarray,
    sources_NHWC: np.ndarray,
    wanted_NHWC: np.ndarray,
    labels_N: np.ndarray,
  ) -> dict[str, float]:
    """Scores images that were made of `sources`, as of a set of real ones.

    `wanted` are held-out images of that set, with the labels of their classes:
    how many samples are recognised as one of these, and the Fréchet distance to
    them. Both are said of the sources, too. `moved` is how far a pixel went, in
    the root mean square.
    """
    classes = np.unique(labels_N)
    wanted = self.classifier.features(self.stored(wanted_NHWC))
    found = {}
    for name, images in (("samples", samples_NHWC), ("sources", sources_NHWC)):
      stored = self._sound(images)
      there_N = np.isin(self.classifier.predict(stored), classes)
      found[f"{name}_recognised"] = float(np.mean(there_N))
      found[f"{name}_frechet"] = distances.frechet(
        self.classifier.features(stored), wanted
      )
    moved = np.square(np.asarray(samples_NHWC) - np.asarray(sources_NHWC))
    return {**found, "moved": float(np.sqrt(np.mean(moved)))}

  def _sound(self, samples_NHWC: np.ndarray) -> np.ndarray:
    """Returns samples as they are scored; refuses what is not finite."""
    if not np.all(np.isfinite(samples_NHWC)):
      raise errors.NumericError(
        "Some samples are not finite, so there is nothing to score: the "
        "weights are broken, or the solver takes too few steps. Try more "
        "steps, or an earlier checkpoint."
      )
    return self.stored(samples_NHWC)

  def nearest_neighbour(self, samples_NHWC: np.ndarray) -> dict[str, float]:
    """Says how near samples come to training images, beside held-out images.

    Euclidean distances of images in [-1, 1]. Copies would be nearer than the
    held-out images, which are nobody's copies: `closer` is the share of samples
    nearer than all but 1 in 100 of those, so 0.01 for new images; `copies` is
    the share equal to a training image.
    """
    found_N, _ = distances.nearest(self.stored(samples_NHWC), self._train)
    real_N = self._real_distances
    return {
      "samples_mean": float(np.mean(found_N)),
      "held_out_mean": float(np.mean(real_N)),
      "samples_min": float(np.min(found_N)),
      "held_out_min": float(np.min(real_N)),
      "closer": float(np.mean(found_N < np.percentile(real_N, 1))),
      "copies": float(np.mean(found_N == 0.0)),
    }


def _levels(images_NHWC: np.ndarray) -> int:
  """Returns 17 for images of at most those levels, otherwise 256."""
  sixteenths = (np.asarray(images_NHWC) + 1.0) * 8.0
  return 17 if np.allclose(sixteenths, np.round(sixteenths), atol=1e-4) else 256
