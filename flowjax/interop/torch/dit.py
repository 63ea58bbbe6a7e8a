"""A diffusion transformer (DiT, arXiv:2212.09748) and its sampler.

This file needs torch and safetensors, and the two files beside it:

    import torch, model
    dit = model.load(".")
    x_BCHW = model.sample(dit, torch.tensor([0, 1, 2]), guidance=1.5)

Time runs from data at t = 0 to noise at t = 1 on the straight path
x_t = (1 - t) x + t eps, and the network predicts its velocity eps - x.
"""

# Shapes: B batch, C channels, H height, W width of the image, T tokens,
# D width of the network, N heads, K head size, R rotated pairs of a head.

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
  width: int
  depth: int
  heads: int
  mlp_ratio: float
  mlp: str
  norm: str
  mlp_norm_epsilon: float
  position: str
  rope_theta: float
  qk_norm: bool
  num_classes: int
  timestep_scale: float
  frequency_shift: float


# What `sample` can follow; config.json says what the network was trained for.
FLOW = {"path": "straight", "prediction": "velocity"}


def load(
  directory: str | pathlib.Path,
  *,
  device: str | torch.device = "cpu",
  dtype: torch.dtype = torch.float32,
) -> "DiT":
  """Returns the network with the weights of an exported folder."""
  directory = pathlib.Path(directory)
  description = json.loads((directory / "config.json").read_text())
  values = description["model"]
  names = [field.name for field in dataclasses.fields(Config)]
  # Nothing is allocated or drawn for weights that the file replaces.
  with torch.device("meta"):
    model = DiT(Config(**{name: values[name] for name in names}))
  weights = safetensors.torch.load_file(directory / "model.safetensors")
  model.load_state_dict(weights, strict=True, assign=True)
  model.flow = description["flow"]
  return model.to(device, dtype).eval()


class DiT(nn.Module):
  """Predicts the velocity of an image on its way to noise."""

  def __init__(self, config: Config):
    super().__init__()
    patch, width = config.patch_size**2, config.width
    self.config, self.flow = config, FLOW
    channels_in = config.channels + config.context_channels
    self.patch_embed = nn.Linear(patch * channels_in, width)
    self.time_embed = TimeEmbed(config)
    # The last row stands for no label at all, and where there are none it is
    # the only one.
    self.label_embed = nn.Embedding(config.num_classes + 1, width)
    if config.position == "learned":
      height, breadth = config.image_size
      self.pos_embed = nn.Embedding(height * breadth // patch, width)
    self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
    out_channels = config.out_channels or config.channels
    self.final = Final(config, patch * out_channels)

  def forward(
    self,
    x_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    label_B: torch.Tensor | None = None,
    context_BCHW: torch.Tensor | None = None,
  ) -> torch.Tensor:
    if label_B is None:
      size = (len(x_BCHW),)
      label_B = torch.full(size, self.config.num_classes, device=x_BCHW.device)
    if context_BCHW is not None:
      x_BCHW = torch.cat([x_BCHW, context_BCHW], dim=1)
    patch = self.config.patch_size
    dtype = self.patch_embed.weight.dtype
    rows, columns = (size // patch for size in x_BCHW.shape[-2:])
    row_T, column_T = grid(rows, columns, x_BCHW.device)
    angle_TR = None

    x_BTD = self.patch_embed(patchify(x_BCHW.to(dtype), patch))
    match self.config.position:
      case "rope2d":
        head = self.config.width // self.config.heads
        theta = self.config.rope_theta
        angle_TR = angles_2d(row_T, column_T, head // 4, theta)
      case "sincos2d":
        x_BTD = x_BTD + sincos_2d(row_T, column_T, x_BTD.shape[-1]).to(dtype)
      case "learned":
        x_BTD = x_BTD + self.pos_embed.weight

    c_BD = self.time_embed(t_B) + self.label_embed(label_B)
    for block in self.blocks:
      x_BTD = block(x_BTD, c_BD, angle_TR)
    return unpatchify(self.final(x_BTD, c_BD).float(), patch, rows, columns)


class TimeEmbed(nn.Module):
  """Embeds t by 128 waves, of periods from 2 pi to 20000 pi, and an MLP."""

  def __init__(self, config: Config):
    super().__init__()
    self.scale, self.shift = config.timestep_scale, config.frequency_shift
    self.in_proj = nn.Linear(256, config.width)
    self.out_proj = nn.Linear(config.width, config.width)

  def forward(self, t_B: torch.Tensor) -> torch.Tensor:
    angle = time_angles(t_B.float() * self.scale, 128, self.shift)
    waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
    waves = waves.to(self.in_proj.weight.dtype)
    return self.out_proj(F.silu(self.in_proj(waves)))


class Block(nn.Module):
  """Attention and MLP, each shifted, scaled and gated by the condition."""

  def __init__(self, config: Config):
    super().__init__()
    self.modulation = nn.Linear(config.width, 6 * config.width)
    self.attention_norm = Norm(config)
    self.mlp_norm = Norm(config, config.mlp_norm_epsilon)
    self.attention = Attention(config.width, config.heads, config.qk_norm)
    self.mlp = Mlp(config)

  def forward(self, x_BTD, c_BD, angle_TR):
    parts = self.modulation(F.silu(c_BD))[:, None].chunk(6, dim=-1)
    shift, scale, gate = parts[:3]
    h_BTD = self.attention_norm(x_BTD, shift, scale)
    x_BTD = x_BTD + gate * self.attention(h_BTD, angle_TR)
    shift, scale, gate = parts[3:]
    h_BTD = self.mlp_norm(x_BTD, shift, scale)
    return x_BTD + gate * self.mlp(h_BTD)


class Attention(nn.Module):
  """Attends from every token to every token."""

  def __init__(self, width: int, heads: int, qk_norm: bool):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.out_proj = nn.Linear(width, width)
    head = width // heads
    self.query_norm = RMSNorm(head) if qk_norm else nn.Identity()
    self.key_norm = RMSNorm(head) if qk_norm else nn.Identity()

  def forward(self, x_BTD, angle_TR):
    qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
    q_BNTK, k_BNTK, v_BNTK = qkv.permute(2, 0, 3, 1, 4)
    q_BNTK, k_BNTK = self.query_norm(q_BNTK), self.key_norm(k_BNTK)
    if angle_TR is not None:
      q_BNTK, k_BNTK = rotate(q_BNTK, angle_TR), rotate(k_BNTK, angle_TR)
    out_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
    return self.out_proj(out_BNTK.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
  """Two layers with a GELU between, or a SiLU gate (arXiv:2002.05202)."""

  def __init__(self, config: Config):
    super().__init__()
    self.is_gated = config.mlp == "swiglu"
    if self.is_gated:
      hidden = int(2 / 3 * config.mlp_ratio * config.width)
      hidden = -(-hidden // 8) * 8
    else:
      hidden = int(config.mlp_ratio * config.width)
    self.in_proj = nn.Linear(config.width, (1 + self.is_gated) * hidden)
    self.out_proj = nn.Linear(hidden, config.width)

  def forward(self, x_BTD):
    h = self.in_proj(x_BTD)
    if self.is_gated:
      gate, value = h.chunk(2, dim=-1)
      return self.out_proj(F.silu(gate) * value)
    return self.out_proj(F.gelu(h, approximate="tanh"))


class Final(nn.Module):
  """Reads the values of each patch off its token."""

  def __init__(self, config: Config, values: int):
    super().__init__()
    self.modulation = nn.Linear(config.width, 2 * config.width)
    self.norm = Norm(config)
    self.out_proj = nn.Linear(config.width, values)

  def forward(self, x_BTD, c_BD):
    shift, scale = self.modulation(F.silu(c_BD))[:, None].chunk(2, dim=-1)
    return self.out_proj(self.norm(x_BTD, shift, scale))


class Norm(nn.Module):
  """Normalises each token, in float32, then scales and shifts it."""

  def __init__(self, config: Config, epsilon: float = 1e-6):
    super().__init__()
    self.epsilon = epsilon
    self.weight = None
    if config.norm == "rmsnorm":
      self.weight = nn.Parameter(torch.ones(config.width))

  def forward(self, x_BTD, shift_B1D, scale_B1D):
    y_BTD = x_BTD.float()
    if self.weight is None:
      y_BTD = F.layer_norm(y_BTD, y_BTD.shape[-1:], eps=self.epsilon)
    else:
      mean_square = y_BTD.square().mean(dim=-1, keepdim=True)
      y_BTD = y_BTD * torch.rsqrt(mean_square + self.epsilon)
      y_BTD = y_BTD * self.weight.float()
    y_BTD = y_BTD * (1 + scale_B1D.float()) + shift_B1D.float()
    return y_BTD.to(x_BTD.dtype)


class RMSNorm(nn.Module):
  """Divides by the root mean square over the last dim, in float32."""

  def __init__(self, size: int):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(size))

  def forward(self, x):
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6)
    return (y * self.weight.float()).to(x.dtype)


def patchify(x_BCHW, patch: int):
  """Cuts an image into tokens, row by row, each (row, column, channel)."""
  x = x_BCHW.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch))
  return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x_BTP, patch: int, rows: int, columns: int):
  """Puts the tokens of `patchify` together again."""
  x = x_BTP.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
  return x.permute(0, 5, 1, 3, 2, 4).flatten(-2).flatten(-3, -2)


def grid(rows: int, columns: int, device):
  """Returns the row and the column of each token."""
  row_T = torch.arange(rows, device=device).repeat_interleave(columns)
  column_T = torch.arange(columns, device=device).repeat(rows)
  return row_T.float(), column_T.float()


def angles(x, count: int, period: float):
  """Returns x times period^(-i / count) for i < count, on a new last dim."""
  # Rounded once, from float64: near t = 1 the output shows more than that.
  exponent = torch.arange(count, dtype=torch.float64) / count
  return x[..., None] * (period**-exponent).float().to(x.device)


def time_angles(t_B, count: int, shift: float = 0.0):
  """Returns t times 10000^(-i / (count - shift)), rounded as DiT rounds."""
  exponent = -math.log(10000.0) * torch.arange(count, dtype=torch.float32)
  frequency = (exponent / (count - shift)).double().exp().float()
  return t_B[:, None] * frequency.to(t_B.device)


def angles_2d(row_T, column_T, count: int, period: float):
  """Returns the angles of the row and, behind them, of the column."""
  of_row, of_column = (angles(x, count, period) for x in (row_T, column_T))
  return torch.cat([of_row, of_column], dim=-1)


def sincos_2d(row_T, column_T, width: int):
  """Returns DiT's fixed embedding, in which the column comes first."""
  waves = [angles(x, width // 4, 10000.0) for x in (column_T, row_T)]
  return torch.cat([f for x in waves for f in (x.sin(), x.cos())], dim=-1)


def rotate(x_BNTK, angle_TR):
  """Turns each pair (2i, 2i + 1) of a head by its angle, in float32."""
  a, b = x_BNTK.float().unflatten(-1, (-1, 2)).unbind(-1)
  cos, sin = angle_TR.cos(), angle_TR.sin()
  turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
  return turned.flatten(-2).to(x_BNTK.dtype)


@torch.no_grad()
def sample(
  model: DiT,
  label_B: torch.Tensor,
  *,
  context_BCHW: torch.Tensor | None = None,
  steps: int = 50,
  solver: str = "heun",
  guidance: float = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  shift: float = 1.0,
  seed: int = 0,
  noise_BCHW: torch.Tensor | None = None,
) -> torch.Tensor:
  """Integrates dx/dt = v from noise at t = 1 to data at t = 0.

  `solver` is "euler" or "heun". `guidance` above 1 follows the labels more
  closely, for t in `interval`; `shift` above 1 spends more of the steps near
  noise, by t <- s t / (s t + 1 - t) (arXiv:2403.03206, eq. 23). The context is
  what a network with `context_channels` is shown beside the image.
  """
  if model.flow != FLOW:
    raise ValueError(
      f"this network predicts {model.flow['prediction']!r} on the path "
      f"{model.flow['path']!r}; sample() follows a velocity on the straight one"
    )
  if solver not in ("euler", "heun"):
    raise ValueError(f"solver must be 'euler' or 'heun', not {solver!r}")
  device = model.patch_embed.weight.device
  label_B = label_B.to(device)
  if noise_BCHW is None:
    # Drawn on the CPU, so that a seed means the same on every device.
    config, generator = model.config, torch.Generator().manual_seed(seed)
    size = (len(label_B), config.channels, *config.image_size)
    noise_BCHW = torch.randn(size, generator=generator)
  x_BCHW = noise_BCHW.to(device, torch.float32)

  if context_BCHW is not None:
    context_BCHW = context_BCHW.to(device, torch.float32)
  velocity = guided(model, label_B, context_BCHW, guidance, interval)
  times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
  times = (shift * times / (shift * times + (1.0 - times))).float()
  for t, t_next in itertools.pairwise(times):
    v_BCHW = velocity(x_BCHW, t)
    if solver == "heun":
      ahead_BCHW = velocity(x_BCHW + (t_next - t) * v_BCHW, t_next)
      v_BCHW = (v_BCHW + ahead_BCHW) / 2
    x_BCHW = x_BCHW + (t_next - t) * v_BCHW
  return x_BCHW


def guided(
  model, label_B, context_BCHW, scale: float, interval: tuple[float, float]
):
  """Returns velocity(x, t) = v_null + scale (v - v_null) for t in `interval`.

  Classifier-free guidance (arXiv:2207.12598); elsewhere the velocity is v.
  """
  null_B = torch.full_like(label_B, model.config.num_classes)
  both_B, both_BCHW = torch.cat([label_B, null_B]), context_BCHW
  if context_BCHW is not None:
    both_BCHW = torch.cat([context_BCHW, context_BCHW])

  def velocity(x_BCHW, t):
    t_B = t.to(x_BCHW.device).expand(len(x_BCHW))
    if scale == 1.0 or not interval[0] <= t <= interval[1]:
      return model(x_BCHW, t_B, label_B, context_BCHW)
    twice = torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B])
    v_BCHW, null_BCHW = model(*twice, both_B, both_BCHW).chunk(2)
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
  if model.config.context_channels:
    parser.error("this network is shown an image beside: call sample()")
  if model.config.channels not in (1, 3):
    parser.error("these samples are latents: call sample() and decode them")
  labels, classes = torch.tensor(flags.labels), model.config.num_classes
  if not classes:
    labels = torch.zeros_like(labels)  # So many, of no class.
  elif min(flags.labels) < 0 or max(flags.labels) >= classes:
    parser.error(f"argument --labels: classes are 0 to {classes - 1}")
  x_BCHW = sample(
    model,
    labels,
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
