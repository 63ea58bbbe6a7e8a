"""Where the images come from, and in which order."""

import dataclasses
import itertools

from flowjax.data import tokenizers

ON_CORRUPT = ("skip", "stop")
ON_NO_CAPTION = ("stop", "skip", "empty")
# Batches of one bucket should cost about what those of another do.
MOST_TIMES_THE_AREA = 2
# Above it Pillow refuses an image, whatever it is told.
MOST_PIXELS = 178_956_970


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """A source, how its images are cut, and how batches are drawn from it.

  `source` is one of `sources.KINDS`; docs/data.md has an example of each.
  `tokenizer`, "bytes" or "words" or "files:<dir>", makes `tokens` tokens of
  each caption; `words` are those that "words" knows. The order of the examples
  follows from `shuffle_seed` and `batch_size` alone: neither `workers`, nor
  `prefetch`, nor the number of processes changes it.
  """

  source: str = "digits"
  image_size: tuple[int, int] = (8, 8)
  # Aspect buckets, (height, width) of what the network sees; none by default.
  buckets: tuple[tuple[int, int], ...] = ()
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
  tokenizer: str | None = None
  tokens: int = 32
  words: tuple[str, ...] = ()
  pair_source: str | None = None  # Images at t = 1, for the coupling "pairs".
  # Texts rather than labels; None: whatever the source clearly has.
  captions: bool | None = None
  on_no_caption: str = "stop"
  # Without labels and captions, which need not be there: for a network that is
  # told nothing.
  images_alone: bool = False
  templates: tuple[str, ...] = ()  # Make captions of labels: "a photo of a {}".
  # Columns of hf, features of tfds, keys of JSON; None: the usual or only one.
  image_key: str | None = None
  caption_key: str | None = None
  # For the source "mixture": (source, weight) of each.
  mixture: tuple[tuple[str, float], ...] = ()
  max_pixels: int = 80_000_000  # An image of more is corrupt, and not decoded.
  index_dir: str | None = None  # Where listings of files and shards are kept.
  # Records of images also say their "size", and the "crop" that was taken.
  originals: bool = False
  # The side of a patch: images of all buckets are laid out alike, on canvases.
  padded_patch: int = 0
  # At most so many boxes an image, of things by these names, and no caption.
  boxes: int = 0
  box_names: tuple[str, ...] = ()

  def __post_init__(self):
    if len(self.image_size) != 2 or min(self.image_size) < 1:
      raise ValueError(
        f"image_size={self.image_size} must be (height, width), both positive."
      )
    for key in ("batch_size", "channels", "prefetch"):
      if getattr(self, key) < 1:
        raise ValueError(f"{key}={getattr(self, key)} must be at least 1.")
    for key in ("shuffle_seed", "workers", "boxes"):
      if getattr(self, key) < 0:
        raise ValueError(f"{key}={getattr(self, key)} must not be negative.")
    if self.on_corrupt not in ON_CORRUPT:
      raise ValueError(
        f"on_corrupt={self.on_corrupt!r} must be one of {ON_CORRUPT}: skip "
        "takes the next sound image instead and counts it, stop ends the run."
      )
    self._check_tokenizer()
    self._check_buckets()
    told = self.tokenizer or self.templates or self.captions or self.boxes
    if self.images_alone and told:
      raise ValueError(
        "images_alone leaves out what is said of images, and tokenizer, "
        "templates, captions=True and boxes are for that: leave out one or the "
        "other."
      )
    if self.on_no_caption not in ON_NO_CAPTION:
      raise ValueError(
        f"on_no_caption={self.on_no_caption!r} must be one of {ON_NO_CAPTION}: "
        "an image without a caption stops the run before it begins, is left "
        "out, or has the empty caption."
      )
    for template in self.templates:
      if template.count("{}") != 1 or set("{}") & set(
        template.replace("{}", "")
      ):
        raise ValueError(
          f"templates: {template!r} must have '{{}}' once, where the name of "
          "the class goes, and no other brace."
        )
    if (self.source == "mixture") != bool(self.mixture):
      raise ValueError(
        f"source={self.source!r} and mixture={self.mixture}: the source "
        "'mixture' needs (source, weight) of each in mixture, and any other "
        "source none."
      )
    self._check_boxes()
    if not 1 <= self.max_pixels <= MOST_PIXELS:
      raise ValueError(
        f"max_pixels={self.max_pixels} must be from 1 to {MOST_PIXELS:,}: "
        "above, Pillow takes any image for a bomb."
      )
    if not 0.0 <= self.held_out < 1.0:
      raise ValueError(
        f"held_out={self.held_out} is the fraction of the images that training "
        "never sees: at least 0 and below 1."
      )

  def _check_buckets(self):
    if not self.buckets:
      return
    for bucket in self.buckets:
      if len(bucket) != 2 or min(bucket) < 1:
        raise ValueError(
          f"buckets: {bucket} must be (height, width), both positive."
        )
    if tuple(self.image_size) not in {tuple(b) for b in self.buckets}:
      raise ValueError(
        f"image_size={self.image_size} must be one of the buckets "
        f"{self.buckets}: the network is made and counted for it."
      )
    for one, other in itertools.combinations(self.buckets, 2):
      if one[0] * other[1] == one[1] * other[0]:
        raise ValueError(
          f"buckets: {one} and {other} are of one aspect, by which an image "
          "finds its bucket: keep one of them."
        )
    low, high = (f(self.buckets, key=lambda b: b[0] * b[1]) for f in (min, max))
    if high[0] * high[1] > MOST_TIMES_THE_AREA * low[0] * low[1]:
      raise ValueError(
        f"buckets: {high} has {high[0] * high[1] / (low[0] * low[1]):.2f} "
        f"times the area of {low}, and {MOST_TIMES_THE_AREA} is the most: they "
        "should be of about equal area, as `buckets.of_area` makes them."
      )

  def _check_tokenizer(self):
    known = (None, *tokenizers.NAMES)
    files = (self.tokenizer or "").startswith(tokenizers.FILES)
    if self.tokenizer not in known and not files:
      raise ValueError(
        f"tokenizer={self.tokenizer!r} must be one of {tokenizers.NAMES}, "
        f"{tokenizers.FILES}<dir> for one read from a folder, or None for data "
        "without captions."
      )
    if self.tokens < 2:
      raise ValueError(
        f"tokens={self.tokens} must be at least 2: the last ends a caption."
      )
    if (self.tokenizer == "words") != bool(self.words):
      raise ValueError(
        f"tokenizer={self.tokenizer!r} with {len(self.words)} words: the "
        "tokenizer 'words' needs the list of them, and no other has one."
      )

  def _check_boxes(self):
    if bool(self.boxes) != bool(self.box_names):
      raise ValueError(
        f"boxes={self.boxes} and {len(self.box_names)} box_names: for layouts "
        "set both, the most boxes of an image and the names of what is in "
        "them; else neither."
      )
    if len(set(self.box_names)) < len(self.box_names):
      raise ValueError("box_names: each name is to be there once.")
    if self.boxes and self.flip:
      raise ValueError(
        f"boxes={self.boxes} and flip=True: an image would be mirrored, and "
        "its boxes not. Set flip=False."
      )
    if self.boxes and self.tokenizer:
      raise ValueError(
        f"boxes={self.boxes} and tokenizer={self.tokenizer!r}: a network is "
        "told a layout or a caption; leave one out."
      )

  def build_tokenizer(self) -> tokenizers.Tokenizer | None:
    """Returns what makes tokens of captions, if anything does."""
    if self.tokenizer is None:
      return None
    return tokenizers.build(self.tokenizer, self.tokens, self.words)
