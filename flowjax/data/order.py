"""The order of the examples, as a pure function of seed and position.

A run sees the positions 0, 1, 2, ...: position p of a source of N records lies
in epoch p // N. Nothing is drawn one after the other and nothing is kept, so
that any position can be the first and any process can ask for any part.
"""

# Shape suffixes: B positions, K of those who take turns, M turns of a cycle.

import functools
from collections.abc import Sequence

import numpy as np

ROUNDS = 8
# Keep coins and choices apart from the keys of the permutations.
_TOSS, _CHOICE, _TURN = 0xF11B, 0xC401CE, 0x70264
# Rounding a share of so many turns changes it by 3% at most.
_FEWEST_TURNS, _MOST_TURNS = 32, 2**22


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


def apart(seed: int, k: int) -> int:
  """Returns a seed for each of several orders; the first keeps the seed."""
  return int(mix((seed + (k << 32)) % 2**64)[0]) if k else seed


def shares(counts: Sequence[int]) -> tuple[int, ...]:
  """Returns how many turns of a cycle each has, as the counts are.

  By largest remainder. The cycle is as short as gives the smallest 32 turns, so
  that nobody's share is further than 1/32 from what it should be. It has 2^22
  at most, where a part smaller than 1 in 2^17 may be further.
  """
  whole = sum(counts)
  turns = min(-(-_FEWEST_TURNS * whole // min(counts)), _MOST_TURNS)
  parts = [divmod(count * turns, whole) for count in counts]
  rest = turns - sum(full for full, _ in parts)
  by_remainder = sorted(range(len(parts)), key=lambda k: -parts[k][1])
  more = set(by_remainder[:rest])
  # One of too many to be counted still has a turn.
  return tuple(max(1, full + (k in more)) for k, (full, _) in enumerate(parts))


def turn(seed: int, shares: tuple[int, ...], step: int) -> tuple[int, int]:
  """Returns whose turn a step is, and how many turns it had before.

  In every cycle each has its share of turns, in an order that is a permutation
  of its own.
  """
  cycle, place = divmod(step, sum(shares))
  owner_M, rank_M = _cycle(seed, shares, cycle)
  k = int(owner_M[place])
  return k, cycle * shares[k] + int(rank_M[place])


@functools.lru_cache(maxsize=2)
def _cycle(
  seed: int, shares: tuple[int, ...], cycle: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns who has each turn, and how many turns of the cycle it had."""
  count = sum(shares)
  place_M = records(seed ^ _TURN, count, np.arange(count) + cycle * count)
  owner_M = np.searchsorted(np.cumsum(shares), place_M, side="right")
  rank_M = np.empty(count, np.int32)
  rank_M[np.argsort(owner_M, kind="stable")] = np.concatenate(
    [np.arange(share) for share in shares]
  )
  return owner_M.astype(np.int16), rank_M


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
