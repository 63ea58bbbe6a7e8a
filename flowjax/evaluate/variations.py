"""Whether variations of an image are like it, and are not copies of it."""

# Shape suffixes: N originals, V variations of each, M real images, H height, W
# width, C channels, X pixels of an image in a row.

import dataclasses

import numpy as np

from flowjax.evaluate import digits


@dataclasses.dataclass(frozen=True)
class Judge:
  """Real images, of which the first are varied, their classes, and who tells.

  `least` is the least distance between two of them.
  """

  digits: digits.Digits
  image_MHWC: np.ndarray
  label_M: np.ndarray

  @property
  def least(self) -> float:
    real_MX = self._flat(self.image_MHWC)
    between_MM = between(real_MX, real_MX)
    return float(between_MM[~np.eye(len(real_MX), dtype=bool)].min())

  def others(self, i: int) -> np.ndarray:
    """Returns which other images are of the class of image i."""
    same_M = self.label_M == self.label_M[i]
    same_M[i] = False
    return np.flatnonzero(same_M)

  def score(
    self, drawn_NVHWC: np.ndarray, which_N: np.ndarray
  ) -> dict[str, float]:
    """Scores what was made of the real images `which_N`.

    `same_class` is the share that a classifier takes for what the original is.
    Distances are Euclidean, of images in [-1, 1], on average: `to_original`
    between a variation and its original, `to_others` between it and the other
    real images of that class, `among` between the variations of one original.
    `copies` is the share nearer to its original than any two real images are to
    each other.
    """
    count, each = drawn_NVHWC.shape[:2]
    flat = drawn_NVHWC.reshape(-1, *drawn_NVHWC.shape[2:])
    classes = self.digits.classifier.predict(self.digits.stored(flat))
    right_NV = classes.reshape(count, each) == self.label_M[which_N][:, None]
    real_MX = self._flat(self.image_MHWC)
    to_original, to_others, among = [], [], []
    for i, drawn_VHWC in zip(which_N, drawn_NVHWC, strict=True):
      drawn_VX = self._flat(drawn_VHWC)
      away_VM = between(drawn_VX, real_MX)
      to_original.append(away_VM[:, i])
      to_others.append(away_VM[:, self.others(i)].mean())
      pairs = ~np.eye(each, dtype=bool)
      among.append(between(drawn_VX, drawn_VX)[pairs].mean())
    return {
      "same_class": float(np.mean(right_NV)),
      "to_original": float(np.mean(to_original)),
      "to_others": float(np.mean(to_others)),
      "among": float(np.mean(among)),
      "copies": float(np.mean(np.array(to_original) < self.least)),
    }

  def _flat(self, image_MHWC: np.ndarray) -> np.ndarray:
    return self.digits.stored(image_MHWC).reshape(len(image_MHWC), -1)


def between(one_NX: np.ndarray, other_MX: np.ndarray) -> np.ndarray:
  """Returns the distances [N, M]."""
  return np.linalg.norm(one_NX[:, None] - other_MX[None], axis=-1)
