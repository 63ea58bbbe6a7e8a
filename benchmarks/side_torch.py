"""PyTorch's side: the same networks (torch_networks.py), trained at their best.

The same parameters, loss, optimizer and average. Fused attention
(scaled_dot_product_attention), fused AdamW, multi-tensor averaging; bfloat16 by
autocast over float32 parameters; `torch.compile` as the workload says.
"""

import contextlib
import functools
from typing import Any

import torch
import torch_networks
import traces
import workload
from child import MATMUL_SIZE
from torch.nn import attention

_backends = attention.SDPBackend
ATTENTION = {
  "flash": [_backends.FLASH_ATTENTION],
  "cudnn": [_backends.CUDNN_ATTENTION],
}


class Trainer:
  """The model, its optimizer and its average, and one update of them."""

  def __init__(self, work: workload.Workload, device: torch.device):
    self.work, self.device = work, device
    with device:
      self.network = torch_networks.build(work)
    self.model = self.network.model
    self.params: list[torch.Tensor] = list(self.model.parameters())
    for param in self.params:
      torch.nn.init.normal_(param, std=0.02)
    self.ema = [param.detach().clone() for param in self.params]
    self.optimizer = torch.optim.AdamW(
      self.params, lr=workload.LEARNING_RATE, weight_decay=0.0, fused=True
    )
    self.steps = 0
    self.forward = self.loss
    if work.compile == "whole":
      self.forward = torch.compile(self.loss)
    elif work.compile == "blocks":
      for block in self.network.blocks:
        block.compile()

  def loss(self, x_BCHW, eps_BCHW, t_B, *cond) -> torch.Tensor:
    """Returns the rectified-flow loss |v(x_t, t) - (eps - x)|^2."""
    t_B111 = t_B[:, None, None, None]
    xt_BCHW = (1.0 - t_B111) * x_BCHW + t_B111 * eps_BCHW
    v_BCHW = self.network.velocity(xt_BCHW, t_B, *cond)
    return torch.nn.functional.mse_loss(v_BCHW, eps_BCHW - x_BCHW)

  def update(self, x_BCHW, eps_BCHW, t_B, *cond) -> torch.Tensor:
    """Moves the parameters and their average once."""
    with contextlib.ExitStack() as stack:
      if self.device.type == "cuda":
        # The model's tables of angles are then made there, not copied there.
        stack.enter_context(self.device)
      if self.work.attention != "auto":
        stack.enter_context(
          attention.sdpa_kernel(ATTENTION[self.work.attention])
        )
      stack.enter_context(
        torch.autocast(
          self.device.type,
          torch.bfloat16,
          enabled=self.work.dtype == "bfloat16",
        )
      )
      loss = self.forward(x_BCHW, eps_BCHW, t_B, *cond)
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    decay = min(workload.EMA_DECAY, (1 + self.steps) / (10 + self.steps))
    with torch.no_grad():
      torch._foreach_lerp_(self.ema, self.params, 1.0 - decay)
    self.steps += 1
    return loss.detach()

  def step(self, x_BCHW, *cond) -> torch.Tensor:
    """Draws noise, times and dropped conditions, and updates."""
    batch = (len(x_BCHW),)
    draw = functools.partial(torch.rand, batch, device=self.device)
    eps_BCHW = torch.randn_like(x_BCHW)
    t_B = torch.randn(batch, device=self.device).sigmoid()
    dropped_B = draw() < workload.LABEL_DROPOUT
    cond = self.network.dropped(dropped_B, *cond)
    return self.update(x_BCHW, eps_BCHW, t_B, *cond)


class Side:
  """Answers what `measure.Side` asks, and describes itself."""

  def __init__(self, work: workload.Workload):
    self.work = work
    self.device = torch.device("cuda" if work.device == "gpu" else "cpu")
    torch.manual_seed(0)
    if work.threads is not None:
      torch.set_num_threads(work.threads)
    size = (MATMUL_SIZE[work.device],) * 2
    x = torch.randn(size, device=self.device)
    self.matrix = x.to(getattr(torch, work.dtype))

  def build(self) -> dict[str, Any]:
    """Makes everything and takes the first step, which is what compiles."""
    self.trainer = Trainer(self.work, self.device)
    self.batch = self.trainer.network.draw(self.work.batch, self.device)
    self.wait(self.step())
    return {"parameters": sum(p.numel() for p in self.trainer.params)}

  def step(self):
    self.loss = self.trainer.step(*self.batch)
    return self._mark()

  def matmul(self):
    torch.matmul(self.matrix, self.matrix)
    return self._mark()

  def wait(self, handle) -> None:
    if handle is not None:
      handle.synchronize()

  def kernels(self, count: int) -> list[dict[str, Any]]:
    """Returns where the device's time goes, per step."""

    def run():
      for _ in range(count):
        last = self.step()
      self.wait(last)

    return traces.of_torch(run, count)

  def report(self) -> dict[str, Any]:
    on_gpu = self.device.type == "cuda"
    return {
      "device": torch.cuda.get_device_name() if on_gpu else "cpu",
      "versions": f"torch {torch.__version__}",
      "threads": torch.get_num_threads(),
      "loss": float(self.loss),
      "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
      if on_gpu
      else 0.0,
    }

  def _mark(self):
    """Marks the end of what is enqueued; a CPU has finished already."""
    if self.device.type == "cpu":
      return None
    event = torch.cuda.Event()
    event.record()
    return event
