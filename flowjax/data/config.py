"""Where the images come from, and in which order."""

import dataclasses

ON_CORRUPT = ("skip", "stop")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """A source, how its images are cut, and how batches are drawn from it.

  `source` is "digits", "tfds:<name>", "folder:<dir>", "embedded:<dir>" or
  "arrayrecord:<dir>", which `flowjax encode` writes. The order of the examples
  follows from `shuffle_seed` and `batch_size` alone: neither `workers`, nor
  `prefetch`, nor the number of processes changes it.
  """

  source: str = "digits"
  image_size: tuple[int, int] = (8, 8)
  channels: int = 1
  batch_size: int = 128  # Over all processes.
  shuffle_seed: int = 0
  workers: int = 0  # Reading processes; 0 reads in the process that trains.
  flip: bool = False
  on_corrupt: str = "skip"
  held_out: float = 0.2  # For sources without a split of their own.
  train_split: str = "train"  # tfds only, and so is the next.
  eval_split: str = "validation"
  prefetch: int = 2
  data_dir: str | None = None
  pair_source: str | None = None  # Images at t = 1, for the coupling "pairs".

  def __post_init__(self):
    if len(self.image_size) != 2 or min(self.image_size) < 1:
      raise ValueError(
        f"image_size={self.image_size} must be (height, width), both positive."
      )
    for key in ("batch_size", "channels", "prefetch"):
      if getattr(self, key) < 1:
        raise ValueError(f"{key}={getattr(self, key)} must be at least 1.")
    for key in ("shuffle_seed", "workers"):
      if getattr(self, key) < 0:
        raise ValueError(f"{key}={getattr(self, key)} must not be negative.")
    if self.on_corrupt not in ON_CORRUPT:
      raise ValueError(
        f"on_corrupt={self.on_corrupt!r} must be one of {ON_CORRUPT}: skip "
        "takes the next sound image instead and counts it, stop ends the run."
      )
    if not 0.0 <= self.held_out < 1.0:
      raise ValueError(
        f"held_out={self.held_out} is the fraction of the images that training "
        "never sees: at least 0 and below 1."
      )
