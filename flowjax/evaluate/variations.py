"""Whether variations of an image are like it, and are not copies of it."""

# Shape suffixes: N originals, V variations of each, M other images, H height,
# W width, C channels.

import numpy as np

from flowjax.evaluate import digits


def score(
  judge: digits.Digits,
  drawn_NVHWC: np.ndarray,
  original_NHWC: np.ndarray,
  label_N: np.ndarray,
) -> dict[str, float]:
  """Scores variations of originals that are of the classes `label_N`.

  `same_class` is the share that a classifier takes for what the original is.
  Distances are Euclidean, of images in [-1, 1], on average: `to_original`
  between a variation and its original, `to_others` between it and the other
  originals of the same class, `among` between two variations of one original.
  `copies` is the share that is nearer to its original than any two originals
  are to each other.
  """
  count, each = drawn_NVHWC.shape[:2]
  flat = drawn_NVHWC.reshape(-1, *drawn_NVHWC.shape[2:])
  stored = judge.stored(flat)
  classes = judge.classifier.predict(stored).reshape(count, each)
  stored_NVX = stored.reshape(count, each, -1)
  original_NX = judge.stored(original_NHWC).reshape(count, -1)
  to_original_NV = np.linalg.norm(stored_NVX - original_NX[:, None], axis=-1)
  between_NN = between(original_NX, original_NX)
  same_NN = (label_N[:, None] == label_N) & ~np.eye(count, dtype=bool)
  to_others = [
    between(variations_VX, original_NX[same_N]).mean()
    for variations_VX, same_N in zip(stored_NVX, same_NN, strict=True)
    if same_N.any()
  ]
  pairs = ~np.eye(each, dtype=bool)
  among = [between(v_VX, v_VX)[pairs] for v_VX in stored_NVX]
  least = between_NN[~np.eye(count, dtype=bool)].min()
  return {
    "same_class": float(np.mean(classes == label_N[:, None])),
    "to_original": float(np.mean(to_original_NV)),
    "to_others": float(np.mean(to_others)),
    "among": float(np.mean(among)),
    "copies": float(np.mean(to_original_NV < least)),
  }


def between(one_NX: np.ndarray, other_MX: np.ndarray) -> np.ndarray:
  """Returns the distances [N, M]."""
  return np.linalg.norm(one_NX[:, None] - other_MX[None], axis=-1)
