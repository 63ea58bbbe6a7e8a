"""How far apart two sets of images are: as distributions, and one by one."""

# Shape suffixes: N examples of the first set, M of the second, F features.

import numpy as np


def frechet(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
  """Returns the squared Fréchet distance of Gaussians fitted to two sets.

  |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the FID of
  arXiv:1706.08500, eq. 6, for whatever features. It is biased upwards, by more
  the fewer examples there are: compare only distances of like counts.
  """
  a_NF, b_MF = np.asarray(a_NF, np.float64), np.asarray(b_MF, np.float64)
  if min(len(a_NF), len(b_MF)) < 2:
    raise ValueError(
      f"A Fréchet distance of {len(a_NF)} and {len(b_MF)} examples has no "
      "covariance: give at least 2 of each."
    )
  return frechet_of_gaussians(
    np.mean(a_NF, axis=0),
    _covariance(a_NF),
    np.mean(b_MF, axis=0),
    _covariance(b_MF),
  )


def frechet_of_gaussians(
  mean_a_F: np.ndarray,
  cov_a_FF: np.ndarray,
  mean_b_F: np.ndarray,
  cov_b_FF: np.ndarray,
) -> float:
  """Returns the squared Fréchet distance of two Gaussians.

  C_a C_b has the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric and
  has no negative ones: the trace of the root needs no general matrix root.
  """
  root_FF = _root(cov_a_FF)
  eigenvalues_F = np.linalg.eigvalsh(root_FF @ cov_b_FF @ root_FF)
  trace_of_root = np.sum(np.sqrt(np.maximum(eigenvalues_F, 0.0)))
  distance = (
    np.sum(np.square(mean_a_F - mean_b_F))
    + np.trace(cov_a_FF)
    + np.trace(cov_b_FF)
    - 2.0 * trace_of_root
  )
  # Rounding can leave equal Gaussians a little below zero.
  return float(max(distance, 0.0))


def nearest(
  a_NF: np.ndarray, b_MF: np.ndarray, *, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
  """Returns for each of `a` the distance and the index of its nearest of `b`.

  Euclidean; `chunk` of `a` at a time, so that memory stays chunk * M.
  """
  b_MF = np.asarray(b_MF, np.float64).reshape(len(b_MF), -1)
  a_NF = np.asarray(a_NF, np.float64).reshape(len(a_NF), -1)
  square_M = np.sum(np.square(b_MF), axis=1)
  index_N = np.concatenate(
    [
      # |a|^2 is the same for every b.
      np.argmin(square_M - 2.0 * a_NF[start : start + chunk] @ b_MF.T, axis=1)
      for start in range(0, len(a_NF), chunk)
    ]
  )
  # Anew from the difference: the expanded square cannot tell 0 from 1e-8.
  return np.linalg.norm(a_NF - b_MF[index_N], axis=1), index_N


def _covariance(a_NF: np.ndarray) -> np.ndarray:
  return np.atleast_2d(np.cov(a_NF, rowvar=False))


def _root(matrix_FF: np.ndarray) -> np.ndarray:
  """Returns the root of a symmetric matrix without negative eigenvalues."""
  values_F, vectors_FF = np.linalg.eigh(matrix_FF)
  return (vectors_FF * np.sqrt(np.maximum(values_F, 0.0))) @ vectors_FF.T
