"""The model card of an export: what is known of its weights and what is not."""

import dataclasses
import json
import math
from typing import Any

import flowjax
from flowjax.interop import tables

_UNKNOWN = "Not recorded."


@dataclasses.dataclass(frozen=True)
class Card:
  """What a model card tells beyond the weights themselves."""

  name: str | None = None
  data: str | None = None
  step: int | None = None
  weights: str | None = None  # averaged (EMA) or raw
  scores: dict = dataclasses.field(default_factory=dict)
  config: dict = dataclasses.field(default_factory=dict)
  licence: str | None = None


# By the name of the network: what it is, and what its condition is.
_NETWORKS = {
  "dit": ("DiT", "A diffusion transformer (DiT, arXiv:2212.09748)"),
  "mmdit": (
    "MM-DiT",
    "A diffusion transformer of two streams (MM-DiT, arXiv:2403.03206)",
  ),
  "flux": ("FLUX", "A diffusion transformer with the architecture of FLUX.1"),
}
_VELOCITY = {"path": "straight", "prediction": "velocity"}


def render(
  card: Card,
  table: tables.Table,
  config: Any,
  dtype: str,
  flow: dict[str, str],
) -> str:
  """Returns the text of a README.md in Markdown.

  `flow` is the path and the prediction that the network was trained for.
  """
  parameters = sum(map(math.prod, table.keys.values()))
  height, width = config.image_size
  channels_out = getattr(config, "channels_out", config.channels)
  data = card.data or card.config.get("data", {}).get("source")
  kind, what = _NETWORKS[config.name]
  name = card.name or f"{kind} trained on {data or 'data not recorded'}"
  licence = card.licence or (
    "Not chosen yet. Whoever publishes these weights states it here; what the\n"
    "data allows counts too."
  )
  return f"""\
---
library_name: pytorch
tags: [diffusion, flow-matching, {config.name}]
---

# {name}

{what} that predicts
{_predicts(flow)}, conditioned on
{_told(config)}. Exported by FlowJAX {flowjax.__version__}.

- Images: {height} x {width}; channels in: {config.channels}{_beside(config)}, \
out: {channels_out}
- Parameters: {parameters:,}, stored as {dtype}
- Weights: {card.weights or _UNKNOWN}
- Training step: {_UNKNOWN if card.step is None else f"{card.step:,}"}
- Training data: {data or _UNKNOWN}

## Load

`model.py` needs torch and safetensors, nothing else.

```python
import torch
import model  # this folder must be on sys.path

{config.name} = model.load(".")
{_call(config, flow, card.config)}
```

{_drawing(config, flow)}
## Scores

{_rows("score", card.scores) or "None were recorded with these weights."}

## Known and not known

The scores above are all that is recorded. Nothing is known of bias, of safety,
or of how closely samples follow single training images, except where a score
says so.

## Licence

{licence}

## Network

{_rows("key", dataclasses.asdict(config))}
{_training(card.config)}"""


def _predicts(flow: dict[str, str]) -> str:
  if flow == _VELOCITY:
    return (
      "the velocity eps - x on the straight path from data (t = 0) to noise "
      "(t = 1)"
    )
  return f"`{flow['prediction']}` on the path `{flow['path']}`"


def _told(config: Any) -> str:
  if config.num_classes:
    return f"one of {config.num_classes} labels"
  if config.name == "dit":
    return "nothing"
  told = f"texts encoded to [L, {config.text_width}] and"
  told += f" [{config.pooled_width}]"
  if getattr(config, "guidance_embed", False):
    told += ", and a guidance"
  return told


def _beside(config: Any) -> str:
  """Says which channels go in beside those of the image."""
  if not config.context_channels:
    return ""
  return f" and {config.context_channels} of an image beside it"


def _call(config: Any, flow: dict[str, str], trained: dict) -> str:
  """Returns the lines that draw, or evaluate where `sample` cannot follow."""
  shape = f"1, {config.channels}, {', '.join(map(str, config.image_size))}"
  lines, context = [], []
  if config.context_channels:
    beside = f"1, {config.context_channels}, " + ", ".join(
      map(str, config.image_size)
    )
    lines += [f"context_BCHW = torch.zeros({beside})  # the image beside it"]
    context = ['  "context": context_BCHW,']
  if config.name == "dit":
    cond = "torch.tensor([0])" + ", context_BCHW=context_BCHW" * bool(context)
  elif config.num_classes and not context:
    cond = '{"label": torch.tensor([0])}'
  elif config.num_classes:
    cond = "cond"
    lines += ["cond = {", '  "label": torch.tensor([0]),', *context, "}"]
  else:
    cond = "cond"
    lines += [
      "cond = {  # what text encoders make of a text",
      f'  "text": torch.zeros(1, {config.text_tokens}, {config.text_width}),',
      f'  "pooled": torch.zeros(1, {config.pooled_width}),',
      *context,
      "}",
    ]
  if flow == _VELOCITY:
    settings = _settings(trained)
    lines += [
      "images_BCHW = model.sample(",
      f"  {config.name}, {cond}{settings}",
      ")",
    ]
  else:
    lines += [
      f"x_BCHW, t_B = torch.randn({shape}), torch.tensor([0.5])",
      f"out_BCHW = {config.name}(x_BCHW, t_B, {cond})",
    ]
  return "\n".join(lines)


def _settings(config: dict) -> str:
  """Returns the arguments of `sample` with which the run drew its samples."""
  chosen = config.get("sample")
  if not chosen:
    return ""
  solver = chosen["solver"]["name"]
  arguments = {
    "steps": chosen["steps"],
    # The sampler of the PyTorch source has two solvers.
    "solver": solver if solver in ("euler", "heun") else "heun",
    "guidance": chosen["guidance"]["scale"],
    "interval": tuple(chosen["guidance"]["interval"]),
    "shift": chosen["grid"]["shift"] or 1.0,
  }
  return "".join(f",\n  {name}={arguments[name]!r}" for name in arguments)


def _drawing(config: Any, flow: dict[str, str]) -> str:
  if flow != _VELOCITY:
    return "`model.sample` is for velocities on the straight path alone.\n"
  if config.channels not in (1, 3):
    return "The images are latents, to be decoded by their autoencoder.\n"
  if not config.num_classes or config.context_channels:
    return ""
  return "Or `python model.py --labels=0,1,2 --out=grid.png`.\n"


def _rows(heading: str, values: dict) -> str:
  """Returns a table, or nothing for no values."""
  if not values:
    return ""
  rows = [f"| `{key}` | {_text(value)} |" for key, value in values.items()]
  return "\n".join([f"| {heading} | value |", "| --- | --- |", *rows])


def _text(value: Any) -> str:
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def _training(config: dict) -> str:
  if not config:
    return ""
  text = json.dumps(config, indent=2)
  return f"\n## The whole config\n\n```json\n{text}\n```\n"
