"""PyTorch's networks, each with what a training step asks of it.

The DiT is the model of our exports; FLUX and MM-DiT are diffusers' classes,
whose attention is scaled_dot_product_attention.
"""

from typing import Any

import torch
import workload

from flowjax.interop.torch import dit


class Dit:
  """A DiT of labelled images."""

  def __init__(self, work: workload.Workload):
    self.model = dit.DiT(dit.Config(**work.model()))
    self.blocks = list(self.model.blocks)
    self.classes = self.model.config.num_classes

  def draw(self, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Returns latents, and the conditions that belong to them."""
    image = torch.randn((batch, 4, 32, 32), device=device)
    return image, torch.randint(1000, (batch,), device=device)

  def dropped(self, drop_B, label_B) -> tuple[torch.Tensor, ...]:
    """Returns the conditions, of which some examples lose theirs."""
    return (torch.where(drop_B, self.classes, label_B),)

  def velocity(self, x_BCHW, t_B, label_B) -> torch.Tensor:
    return self.model(x_BCHW, t_B, label_B)


class _OfText:
  """A network of diffusers that reads a text and one vector of it."""

  def __init__(self, work: workload.Workload):
    self.values = work.model()
    self.model: Any = self.make()
    self.blocks = [
      *self.model.transformer_blocks,
      *getattr(self.model, "single_transformer_blocks", []),
    ]

  def make(self) -> Any:
    raise NotImplementedError

  def draw(self, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Returns latents, and the conditions that belong to them."""
    values = self.values
    shapes = (
      (values["channels"], *values["image_size"]),
      (values["text_tokens"], values["text_width"]),
      (values["pooled_width"],),
    )
    return tuple(torch.randn((batch, *x), device=device) for x in shapes)

  def dropped(self, drop_B, text_BLE, pooled_BP) -> tuple[torch.Tensor, ...]:
    """Returns the conditions, of which some examples have zeros."""
    return (
      text_BLE.masked_fill(drop_B[:, None, None], 0.0),
      pooled_BP.masked_fill(drop_B[:, None], 0.0),
    )


class Mmdit(_OfText):
  """SD3's MM-DiT."""

  def make(self) -> Any:
    import diffusers

    values = self.values
    width = values["heads"] * values["head_size"]
    return diffusers.SD3Transformer2DModel(
      sample_size=max(values["image_size"]),
      patch_size=values["patch_size"],
      in_channels=values["channels"],
      out_channels=values["channels"],
      num_layers=values["depth"],
      attention_head_dim=values["head_size"],
      num_attention_heads=values["heads"],
      joint_attention_dim=values["text_width"],
      caption_projection_dim=width,
      pooled_projection_dim=values["pooled_width"],
      pos_embed_max_size=values["position_table"],
    )

  def velocity(self, x_BCHW, t_B, text_BLE, pooled_BP) -> torch.Tensor:
    (v_BCHW,) = self.model(
      x_BCHW,
      encoder_hidden_states=text_BLE,
      pooled_projections=pooled_BP,
      timestep=1000.0 * t_B,
      return_dict=False,
    )
    return v_BCHW


class Flux(_OfText):
  """FLUX, to which patches come flattened."""

  def make(self) -> Any:
    import diffusers

    values = self.values
    self.patch = values["patch_size"]
    height, width = (side // self.patch for side in values["image_size"])
    self.places = torch.zeros(height, width, 3)
    self.places[..., 1] = torch.arange(height)[:, None]
    self.places[..., 2] = torch.arange(width)
    self.places = self.places.flatten(0, 1)
    return diffusers.FluxTransformer2DModel(
      in_channels=values["channels"] * self.patch**2,
      num_layers=values["double_depth"],
      num_single_layers=values["single_depth"],
      attention_head_dim=values["width"] // values["heads"],
      num_attention_heads=values["heads"],
      joint_attention_dim=values["text_width"],
      pooled_projection_dim=values["pooled_width"],
      guidance_embeds=values["guidance_embed"],
      axes_dims_rope=values["rope_axes"],
    )

  def velocity(self, x_BCHW, t_B, text_BLE, pooled_BP) -> torch.Tensor:
    (v_BTP,) = self.model(
      self._packed(x_BCHW),
      encoder_hidden_states=text_BLE,
      pooled_projections=pooled_BP,
      timestep=t_B,
      img_ids=self.places,
      txt_ids=torch.zeros(text_BLE.shape[1], 3, device=t_B.device),
      guidance=torch.ones_like(t_B),
      return_dict=False,
    )
    return self._unpacked(v_BTP, x_BCHW.shape)

  def _packed(self, x_BCHW) -> torch.Tensor:
    p = self.patch
    batch, channels, height, width = x_BCHW.shape
    x = x_BCHW.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

  def _unpacked(self, v_BTP, shape) -> torch.Tensor:
    p = self.patch
    batch, channels, height, width = shape
    v = v_BTP.reshape(batch, height // p, width // p, channels, p, p)
    return v.permute(0, 3, 1, 4, 2, 5).reshape(shape)


KINDS = {"dit": Dit, "flux": Flux, "mmdit": Mmdit}


def build(work: workload.Workload) -> Any:
  """Returns the network of a workload, on the default device."""
  return KINDS[work.kind](work)
