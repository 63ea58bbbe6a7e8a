"""The transformer of Stable Diffusion 3 (MM-DiT, arXiv:2403.03206), a sampler.

This file needs torch and safetensors, and the two files beside it:

    import torch, model
    mmdit = model.load(".")
    cond = {"text": text_BLE, "pooled": pooled_BP}
    x_BCHW = model.sample(mmdit, cond, guidance=4.0, shift=3.0)

`text` is what a text encoder says of each token, `pooled` what it says of all;
where some tokens are padding, `text_mask` [B, L] is true for the others; and
`negative`, with the same keys, stands in for no text. A network of labels takes
{"label": label_B} instead.

Time runs from data at t = 0 to noise at t = 1 on the straight path
x_t = (1 - t) x + t eps, and the network predicts its velocity eps - x.
"""

# Shapes: B batch, C channels, H height, W width of the image, T its tokens,
# L text tokens, E width of the text, P of the pooled text, D width of the
# network, N heads, K head size, A axes of the image, R rotated pairs of a head.

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import struct
import zlib

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Config:
  """The part of config.json that shapes the network."""

  image_size: tuple[int, int]
  channels: int
  context_channels: int
  out_channels: int | None
  patch_size: int
  depth: int
  heads: int
  head_size: int
  mlp_ratio: float
  text_width: int
  pooled_width: int
  position: str
  position_table: int
  position_scale: float
  position_offset: float
  rope_theta: float
  qk_norm: bool
  dual_layers: int
  num_classes: int
  label_tokens: int
  timestep_scale: float

  @property
  def width(self) -> int:
    return self.heads * self.head_size


# What `sample` can follow; config.json says what the network was trained for.
FLOW = {"path": "straight", "prediction": "velocity"}


def load(
  directory: str | pathlib.Path,
  *,
  device: str | torch.device = "cpu",
  dtype: torch.dtype = torch.float32,
) -> "MMDiT":
  """Returns the network with the weights of an exported folder."""
  directory = pathlib.Path(directory)
  description = json.loads((directory / "config.json").read_text())
  values = description["model"]
  names = [field.name for field in dataclasses.fields(Config)]
  # Nothing is allocated or drawn for weights that the file replaces.
  with torch.device("meta"):
    model = MMDiT(Config(**{name: values[name] for name in names}))
  weights = safetensors.torch.load_file(directory / "model.safetensors")
  model.load_state_dict(weights, strict=True, assign=True)
  model.flow = description["flow"]
  return model.to(device, dtype).eval()


class MMDiT(nn.Module):
  """Predicts the velocity of an image on its way to noise, given a text."""

  def __init__(self, config: Config):
    super().__init__()
    patch, width = config.patch_size**2, config.width
    self.config, self.flow = config, FLOW
    channels_in = config.channels + config.context_channels
    self.patch_embed = nn.Linear(patch * channels_in, width)
    self.text_embed = nn.Linear(config.text_width, width)
    self.time_embed = TimeEmbed(width, config.timestep_scale)
    self.pooled_embed = Embed(config.pooled_width, width)
    if config.num_classes:
      self.label_embed = LabelEmbed(config)
    # The first have a second attention; after the last there is no text.
    self.blocks = nn.ModuleList(
      Block(config, second=i < config.dual_layers, last=i == config.depth - 1)
      for i in range(config.depth)
    )
    out_channels = config.out_channels or config.channels
    self.final = Final(width, patch * out_channels)

  def forward(
    self,
    x_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    cond: dict[str, torch.Tensor],
  ) -> torch.Tensor:
    patch, dtype = self.config.patch_size, self.patch_embed.weight.dtype
    rows, columns = (size // patch for size in x_BCHW.shape[-2:])
    if self.config.context_channels:
      x_BCHW = torch.cat([x_BCHW, cond["context"]], dim=1)
    if self.config.num_classes:
      cond = self.label_embed(cond["label"])
    x_BTD = self.patch_embed(patchify(x_BCHW.to(dtype), patch))
    text_BLD = self.text_embed(cond["text"].to(dtype))
    pooled_BD = self.pooled_embed(cond["pooled"].to(dtype))
    c_BD = F.silu(self.time_embed(t_B) + pooled_BD)

    x_BTD, turns = self.place(x_BTD, rows, columns)
    mask = seen(cond.get("text_mask"), rows * columns)
    for block in self.blocks:
      text_BLD, x_BTD = block(text_BLD, x_BTD, c_BD, turns, mask)
    return unpatchify(self.final(x_BTD, c_BD).float(), patch, rows, columns)

  def place(self, x_BTD, rows: int, columns: int):
    """Adds its position to each token, or says how heads are to turn."""
    config = self.config
    if config.position == "rope2d":
      half = config.head_size // 2
      place_TA = grid(rows, columns)
      turns = rotations(place_TA, (half, half), config.rope_theta)
      return x_BTD, tuple(part.to(x_BTD.device) for part in turns)
    table_TD = sincos_2d(rows, columns, config).to(x_BTD.device)
    return (x_BTD.float() + table_TD).to(x_BTD.dtype), None


class Embed(nn.Module):
  """Maps a vector to the width of the network, with a SiLU on the way."""

  def __init__(self, inputs: int, width: int):
    super().__init__()
    self.in_proj = nn.Linear(inputs, width)
    self.out_proj = nn.Linear(width, width)

  def forward(self, x_BP: torch.Tensor) -> torch.Tensor:
    return self.out_proj(F.silu(self.in_proj(x_BP)))


class TimeEmbed(Embed):
  """Embeds a number by 128 waves, of periods from 2 pi to 20000 pi."""

  def __init__(self, width: int, scale: float):
    super().__init__(256, width)
    self.scale = scale

  def forward(self, t_B: torch.Tensor) -> torch.Tensor:
    angle = time_angles(t_B.float() * self.scale, 128)
    waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return super().forward(waves.to(self.in_proj.weight.dtype))


class LabelEmbed(nn.Module):
  """Holds a text for each label, and one, the last, for no label at all."""

  def __init__(self, config: Config):
    super().__init__()
    rows, size = config.num_classes + 1, config.text_width
    self.text = nn.Parameter(torch.empty(rows, config.label_tokens, size))
    self.pooled = nn.Parameter(torch.empty(rows, config.pooled_width))

  def forward(self, label_B: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"text": self.text[label_B], "pooled": self.pooled[label_B]}


class Block(nn.Module):
  """Text and image, each with weights of its own, attend together."""

  def __init__(self, config: Config, *, second: bool, last: bool):
    super().__init__()
    self.text = Stream(config, last=last)
    self.image = Stream(config, second=second)
    self.last = last

  def forward(self, text_BLD, x_BTD, c_BD, turns, mask):
    of_text, text_parts = self.text.begin(text_BLD, c_BD, None)
    of_image, parts = self.image.begin(x_BTD, c_BD, turns)
    out_BNSK = attend(of_text, of_image, mask)
    length = text_BLD.shape[1]
    x_BTD = self.image.end(x_BTD, out_BNSK[:, :, length:], parts, turns)
    if not self.last:
      out_BNLK = out_BNSK[:, :, :length]
      text_BLD = self.text.end(text_BLD, out_BNLK, text_parts, None)
    return text_BLD, x_BTD


class Stream(nn.Module):
  """What one stream does in a block, before attention and after it.

  The condition shifts, scales and gates attention, MLP, and with `second` an
  attention among the stream's own tokens. With `last` the stream is only asked.
  """

  def __init__(self, config: Config, *, second=False, last=False):
    super().__init__()
    width = config.width
    self.parts = 2 if last else 9 if second else 6
    self.modulation = nn.Linear(width, self.parts * width)
    self.attention = Attention(config, answers=not last)
    self.attention2 = Attention(config) if second else None
    if not last:
      self.mlp = Mlp(width, int(config.mlp_ratio * width))

  def begin(self, x_BTD, c_BD, turns):
    parts = self.modulation(c_BD)[:, None].chunk(self.parts, dim=-1)
    return self.attention.ask(modulated(x_BTD, *parts[:2]), turns), parts

  def end(self, x_BTD, out_BNTK, parts, turns):
    gate, *of_mlp = parts[2:6]
    before_BTD = x_BTD
    x_BTD = x_BTD + gate * self.attention.answer(out_BNTK)
    if self.attention2 is not None:
      # Both attentions read the stream as it was.
      heads = self.attention2.ask(modulated(before_BTD, *parts[6:8]), turns)
      out_BNTK = F.scaled_dot_product_attention(*heads)
      x_BTD = x_BTD + parts[8] * self.attention2.answer(out_BNTK)
    shift, scale, gate = of_mlp
    return x_BTD + gate * self.mlp(modulated(x_BTD, shift, scale))


class Attention(nn.Module):
  """The maps to queries, keys and values, and from what attention returns."""

  def __init__(self, config: Config, *, answers: bool = True):
    super().__init__()
    width, qk_norm = config.width, config.qk_norm
    self.heads = config.heads
    self.qkv = nn.Linear(width, 3 * width)
    self.query_norm = RMSNorm(config.head_size) if qk_norm else nn.Identity()
    self.key_norm = RMSNorm(config.head_size) if qk_norm else nn.Identity()
    if answers:
      self.out_proj = nn.Linear(width, width)

  def ask(self, x_BTD, turns):
    qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
    q_BNTK, k_BNTK, v_BNTK = qkv.permute(2, 0, 3, 1, 4)
    q_BNTK, k_BNTK = self.query_norm(q_BNTK), self.key_norm(k_BNTK)
    if turns is not None:
      q_BNTK, k_BNTK = rotate(q_BNTK, *turns), rotate(k_BNTK, *turns)
    return q_BNTK, k_BNTK, v_BNTK

  def answer(self, out_BNTK):
    return self.out_proj(out_BNTK.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
  """Two layers with a GELU between."""

  def __init__(self, width: int, hidden: int):
    super().__init__()
    self.in_proj = nn.Linear(width, hidden)
    self.out_proj = nn.Linear(hidden, width)

  def forward(self, x_BTD):
    return self.out_proj(F.gelu(self.in_proj(x_BTD), approximate="tanh"))


class Final(nn.Module):
  """Reads the values of each patch off its token."""

  def __init__(self, width: int, values: int):
    super().__init__()
    self.modulation = nn.Linear(width, 2 * width)
    self.out_proj = nn.Linear(width, values)

  def forward(self, x_BTD, c_BD):
    shift, scale = self.modulation(c_BD)[:, None].chunk(2, dim=-1)
    return self.out_proj(modulated(x_BTD, shift, scale))


class RMSNorm(nn.Module):
  """Divides by the root mean square over the last dim, in float32."""

  def __init__(self, size: int):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(size))

  def forward(self, x):
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6)
    return (y * self.weight.float()).to(x.dtype)


def modulated(x_BTD, shift_B1D, scale_B1D):
  """Normalises each token, in float32, then scales and shifts it."""
  y_BTD = F.layer_norm(x_BTD.float(), x_BTD.shape[-1:], eps=1e-6)
  y_BTD = y_BTD * (1 + scale_B1D.float()) + shift_B1D.float()
  return y_BTD.to(x_BTD.dtype)


def patchify(x_BCHW, patch: int):
  """Cuts an image into tokens, row by row, each (row, column, channel)."""
  x = x_BCHW.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch))
  return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x_BTP, patch: int, rows: int, columns: int):
  """Puts the tokens of `patchify` together again."""
  x = x_BTP.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
  return x.permute(0, 5, 1, 3, 2, 4).flatten(-2).flatten(-3, -2)


def seen(text_mask_BL, tokens: int):
  """Returns which tokens attention sees, text first, or None for all."""
  if text_mask_BL is None:
    return None
  return F.pad(text_mask_BL.bool(), (0, tokens), value=True)[:, None, None]


def attend(of_text, of_image, mask):
  """Lets the tokens of both see each other, text first."""
  both = zip(of_text, of_image, strict=True)
  q_BNSK, k_BNSK, v_BNSK = (torch.cat(pair, dim=2) for pair in both)
  return F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BNSK, attn_mask=mask)


def time_angles(t_B, count: int):
  """Returns t times 10000^(-i / count) for i < count, rounded as published."""
  exponent = -math.log(10000.0) * torch.arange(count, dtype=torch.float32)
  frequency = (exponent / count).double().exp().float()
  return t_B[:, None] * frequency.to(t_B.device)


def grid(rows: int, columns: int):
  """Returns the row and the column of each token, [T, 2]."""
  row_T = torch.arange(rows).repeat_interleave(columns)
  return torch.stack([row_T, torch.arange(columns).repeat(rows)], dim=-1)


def rotations(place_TA, sizes: tuple[int, ...], theta: float):
  """Returns the cosines and sines [T, R] that turn the pairs of a head.

  A part of the head, of the given size, turns with each axis: the pair i of a
  part of size h by place theta^(-2i / h) (arXiv:2104.09864).
  """
  angles = []
  for place_T, size in zip(place_TA.double().T, sizes, strict=True):
    exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
    angles.append(place_T[:, None] * theta**-exponent)
  angle_TR = torch.cat(angles, dim=-1)
  return angle_TR.cos().float(), angle_TR.sin().float()


def sincos_2d(rows: int, columns: int, config: Config):
  """Returns the centre [T, D] of a table of sines, first of the column.

  The middle of the image is the middle of the table; its row or column p stands
  at scale (p - offset).
  """
  side, quarter = config.position_table, config.width // 4
  exponent = torch.arange(quarter, dtype=torch.float64) / quarter

  def waves(count):
    place = (side - count) // 2 + torch.arange(count, dtype=torch.float64)
    place = config.position_scale * (place - config.position_offset)
    angle = place[:, None] * 10000.0**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()

  of_column = waves(columns).repeat(rows, 1)
  of_row = waves(rows).repeat_interleave(columns, dim=0)
  return torch.cat([of_column, of_row], dim=-1)


def rotate(x_BNTK, cos_TR, sin_TR):
  """Turns each pair (2i, 2i + 1) of a head by its angle, in float32."""
  a, b = x_BNTK.float().unflatten(-1, (-1, 2)).unbind(-1)
  turned = [a * cos_TR - b * sin_TR, a * sin_TR + b * cos_TR]
  return torch.stack(turned, dim=-1).flatten(-2).to(x_BNTK.dtype)


@torch.no_grad()
def sample(
  model,
  cond: dict,
  *,
  steps: int = 50,
  solver: str = "heun",
  guidance: float = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  shift: float = 1.0,
  seed: int = 0,
  noise_BCHW: torch.Tensor | None = None,
) -> torch.Tensor:
  """Integrates dx/dt = v from noise at t = 1 to data at t = 0.

  `solver` is "euler" or "heun". `guidance` above 1 follows the condition more
  closely, for t in `interval`; `shift` above 1 spends more of the steps near
  noise, by t <- s t / (s t + 1 - t) (arXiv:2403.03206, eq. 23).
  """
  if model.flow != FLOW:
    raise ValueError(
      f"this network predicts {model.flow['prediction']!r} on the path "
      f"{model.flow['path']!r}; sample() follows a velocity on the straight one"
    )
  if solver not in ("euler", "heun"):
    raise ValueError(f"solver must be 'euler' or 'heun', not {solver!r}")
  device = model.patch_embed.weight.device
  without = moved(unconditional(model, cond), device)
  cond = moved(cond, device)
  if noise_BCHW is None:
    # Drawn on the CPU, so that a seed means the same on every device.
    config, generator = model.config, torch.Generator().manual_seed(seed)
    batch = len(cond["label" if config.num_classes else "text"])
    size = (batch, config.channels, *config.image_size)
    noise_BCHW = torch.randn(size, generator=generator)
  x_BCHW = noise_BCHW.to(device, torch.float32)

  velocity = guided(model, cond, without, guidance, interval)
  times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
  times = (shift * times / (shift * times + (1.0 - times))).float()
  for t, t_next in itertools.pairwise(times):
    v_BCHW = velocity(x_BCHW, t)
    if solver == "heun":
      ahead_BCHW = velocity(x_BCHW + (t_next - t) * v_BCHW, t_next)
      v_BCHW = (v_BCHW + ahead_BCHW) / 2
    x_BCHW = x_BCHW + (t_next - t) * v_BCHW
  return x_BCHW


def moved(cond: dict, device) -> dict:
  """Returns the tensors that a network is told, on its device."""
  return {k: cond[k].to(device) for k in cond if k != "negative"}


def unconditional(model, cond: dict) -> dict:
  """Returns `cond` with what stands for no condition.

  The last label; or the negative text, where there is one; or zeros, all seen.
  """
  if model.config.num_classes:
    last_B = torch.full_like(cond["label"], model.config.num_classes)
    return cond | {"label": last_B}
  if "negative" in cond:
    return cond | cond["negative"]
  empty = {key: torch.zeros_like(cond[key]) for key in ("text", "pooled")}
  if "text_mask" in cond:
    empty["text_mask"] = torch.ones_like(cond["text_mask"])
  return cond | empty


def guided(model, cond, without, scale: float, interval: tuple[float, float]):
  """Returns velocity(x, t) = v_null + scale (v - v_null) for t in `interval`.

  Classifier-free guidance (arXiv:2207.12598); elsewhere the velocity is v.
  """
  both = {key: torch.cat([cond[key], without[key]]) for key in cond}

  def velocity(x_BCHW, t):
    t_B = t.to(x_BCHW.device).expand(len(x_BCHW))
    if scale == 1.0 or not interval[0] <= t <= interval[1]:
      return model(x_BCHW, t_B, cond)
    twice = torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B])
    v_BCHW, null_BCHW = model(*twice, both).chunk(2)
    return null_BCHW + scale * (v_BCHW - null_BCHW)

  return velocity


def write_png(path: str, image_CHW: torch.Tensor):
  """Writes a grey or RGB image with values in [-1, 1]."""
  pixels = (image_CHW.clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()
  channels, height, width = pixels.shape
  rows = pixels.permute(1, 2, 0).flatten(1).tolist()
  chunks = {
    b"IHDR": struct.pack(
      ">2I5B", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0
    ),
    b"IDAT": zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)),
    b"IEND": b"",
  }
  with open(path, "wb") as file:
    file.write(b"\x89PNG\r\n\x1a\n")
    for kind, data in chunks.items():
      check = zlib.crc32(kind + data)
      file.write(struct.pack(">I", len(data)) + kind + data)
      file.write(struct.pack(">I", check))


def numbers(text: str) -> list[int]:
  return [int(word) for word in text.split(",")]


def main():
  parser = argparse.ArgumentParser(description="Draw samples, side by side.")
  parser.add_argument("--labels", type=numbers, default="0,1,2,3")
  parser.add_argument("--out", default="samples.png")
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--guidance", type=float, default=1.5)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  model = load(pathlib.Path(__file__).parent)
  classes = model.config.num_classes
  if not classes:
    parser.error("this network reads texts: encode some and call sample()")
  if model.config.context_channels:
    parser.error("this network is shown an image beside: call sample()")
  if model.config.channels not in (1, 3):
    parser.error("these samples are latents: call sample() and decode them")
  if min(flags.labels) < 0 or max(flags.labels) >= classes:
    parser.error(f"argument --labels: classes are 0 to {classes - 1}")
  x_BCHW = sample(
    model,
    {"label": torch.tensor(flags.labels)},
    steps=flags.steps,
    guidance=flags.guidance,
    seed=flags.seed,
  )
  row_CHW = torch.cat(list(x_BCHW), dim=-1)
  size = max(1, 128 // row_CHW.shape[-2])  # Of a small pixel on the screen.
  for dim in (-2, -1):
    row_CHW = row_CHW.repeat_interleave(size, dim)
  write_png(flags.out, row_CHW)


if __name__ == "__main__":
  main()
