"""What a benchmark trains: the same numbers for both libraries."""

import collections.abc
import dataclasses
import json
from typing import Any

import text_networks

# Table 1 of the DiT paper (arXiv:2212.09748), and one small enough for tests.
SIZES = {
  "tiny": dict(depth=2, width=64, heads=4),
  "s": dict(depth=12, width=384, heads=6),
  "b": dict(depth=12, width=768, heads=12),
  "l": dict(depth=24, width=1024, heads=16),
  "xl": dict(depth=28, width=1152, heads=16),
}
LEARNING_RATE = 1e-4
EMA_DECAY = 0.9999
LABEL_DROPOUT = 0.1

# The settings that a benchmark may try, and what reads their values.
PARSE: dict[str, collections.abc.Callable[[str], Any]] = {
  "batch": int,
  "attention": str,
  "remat": str,
  "scan": {"yes": True, "no": False}.__getitem__,
  "xla": str,
  "compile": str,
}


@dataclasses.dataclass(frozen=True)
class Workload:
  """One training step of one library, and the settings that it runs with.

  `remat`, `scan` and `xla` are FlowJAX's. `compile` is PyTorch's: "none"
  (eager), "whole" (the loss as one graph) or "blocks" (each block by itself).
  `attention` names a body of FlowJAX, or a backend of PyTorch's fused one.
  """

  library: str = "flowjax"
  device: str = "cpu"
  size: str = "s"
  depth: int | None = None
  patch_size: int = 2
  batch: int = 8
  dtype: str = "float32"
  threads: int | None = None
  attention: str = "auto"
  remat: str = "none"
  scan: bool = True
  xla: str = "default"
  compile: str = "none"

  def model(self) -> dict[str, Any]:
    """Returns what shapes the network, by names that both sides know."""
    if self.size in text_networks.SIZES:
      return dict(text_networks.SIZES[self.size])
    values = dict(SIZES[self.size])
    if self.depth is not None:
      values["depth"] = self.depth
    return dict(
      values,
      image_size=(32, 32),
      channels=4,
      context_channels=0,
      out_channels=None,
      patch_size=self.patch_size,
      mlp_ratio=4.0,
      mlp="gelu",
      position="rope2d",
      rope_theta=10000.0,
      qk_norm=False,
      num_classes=1000,
      timestep_scale=1000.0,
      norm="layernorm",
      mlp_norm_epsilon=1e-6,
      frequency_shift=0.0,
    )

  @property
  def kind(self) -> str:
    """The name of the network: "dit", "flux" or "mmdit"."""
    return self.model().get("name", "dit")

  @property
  def tokens(self) -> int:
    """The number of tokens of an image, without those of its text."""
    return text_networks.image_tokens(self.model())

  def forward_flops(self) -> int:
    """Counts the blocks' matrix products for one image; a multiply-add is two.

      L (24 T d^2 + 4 T^2 d + 12 d^2)

    Linear layers with an MLP of 4 d, full attention, adaLN. The patches, the
    embeddings and the last layer are left out: 0.01% of DiT-XL/2. Networks
    that read texts are counted in `text_networks`.
    """
    if self.kind != "dit":
      return text_networks.block_flops(self.model())
    model, tokens = self.model(), self.tokens
    depth, width = model["depth"], model["width"]
    linear = 24 * tokens * width**2 + 12 * width**2
    return depth * (linear + 4 * tokens**2 * width)

  def train_flops(self) -> int:
    """Counts one image of a step: the backward pass is twice the forward.

    Nothing that is computed a second time counts.
    """
    return 3 * self.forward_flops()

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self))

  def changed(self, text: str) -> "Workload":
    """Returns this with "key=value,key=value" applied."""
    values: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
      key, _, value = word.partition("=")
      if key not in PARSE:
        raise ValueError(
          f"{word!r} is no setting. There are: {', '.join(PARSE)}."
        )
      values[key] = PARSE[key](value)
    return dataclasses.replace(self, **values)


def from_json(text: str) -> Workload:
  """Returns the workload that `to_json` wrote."""
  return Workload(**json.loads(text))
