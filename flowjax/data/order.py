"""The order of the examples, as a pure function of seed and position.

A run sees the positions 0, 1, 2, ...: position p of a source of N records lies
in epoch p // N. Nothing is drawn one after the other and nothing is kept, so
that any position can be the first and any process can ask for any part.
"""

# Shape suffixes: B positions.

import numpy as np

ROUNDS = 8
# Keep coins and choices apart from the keys of the permutations.
_TOSS, _CHOICE = 0xF11B, 0xC401CE


def records(seed: int, count: int, position_B: np.ndarray) -> np.ndarray:
  """Returns the record of each position: a permutation in every epoch.

  A Feistel network of keyed hashes permutes 4^h >= count numbers; what falls
  outside is permuted again until it falls inside, which leaves a permutation
  of 0 ... count - 1 (cycle walking, Black and Rogaway 2002, section 4).
  Epochs differ in their keys.
  """
  epoch_B, place_B = np.divmod(position_B.astype(np.uint64), np.uint64(count))
  key_B = mix(mix(seed) ^ epoch_B)
  record_B = _permute(place_B, key_B, count)
  while (outside_B := record_B >= count).any():
    record_B[outside_B] = _permute(record_B[outside_B], key_B[outside_B], count)
  return record_B.astype(np.int64)


def coins(seed: int, position_B: np.ndarray) -> np.ndarray:
  """Tosses a coin for each position."""
  bits_B = mix(mix(seed) ^ mix(_TOSS) ^ position_B.astype(np.uint64))
  return (bits_B & np.uint64(1)) == 1


def choices(seed: int, count: int, position_B: np.ndarray) -> np.ndarray:
  """Draws one of `count` for each position."""
  bits_B = mix(mix(seed) ^ mix(_CHOICE) ^ position_B.astype(np.uint64))
  return (bits_B % np.uint64(count)).astype(np.int64)


def mix(value) -> np.ndarray:
  """Returns 64 well mixed bits for each value (the finalizer of SplitMix64)."""
  bits = np.atleast_1d(np.asarray(value, np.uint64))
  bits = bits + np.uint64(0x9E3779B97F4A7C15)
  bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return bits ^ (bits >> np.uint64(31))


def _permute(value_B: np.ndarray, key_B: np.ndarray, count: int) -> np.ndarray:
  half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
  mask = (np.uint64(1) << half) - np.uint64(1)
  left_B, right_B = value_B >> half, value_B & mask
  for turn in range(ROUNDS):
    hash_B = mix((key_B + np.uint64(turn)) ^ (right_B << np.uint64(32)))
    left_B, right_B = right_B, left_B ^ (hash_B & mask)
  return (left_B << half) | right_B
