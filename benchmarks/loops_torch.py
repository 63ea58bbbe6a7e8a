"""PyTorch's side of solvers.py: loops of diffusers' schedulers.

The network is the model of our exports, with the weights of FlowJAX's side.
What is returned is a function of no arguments that runs once, to its end.
"""

# Shapes: B batch, C channels, H height, W width.

from collections.abc import Callable
from typing import Any

import diffusers
import loops_flowjax
import numpy as np
import torch

from flowjax.interop import dit as layouts
from flowjax.interop.torch import dit

Run = Callable[[], Any]
# By the name of the solver of FlowJAX that is the same method.
SCHEDULERS: dict[str, Callable[[], Any]] = {
  "euler": diffusers.FlowMatchEulerDiscreteScheduler,
  "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(
    use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
  ),
}


class Network:
  """predict(x_BCHW, t_B), with the weights and inputs of FlowJAX's field."""

  def __init__(self, made: loops_flowjax.Field):
    self.x_BCHW = torch.from_numpy(made.x_BHWC.transpose(0, 3, 1, 2).copy())
    label_B = torch.from_numpy(made.cond["label"].astype(np.int64))
    if made.config is None:
      scale = torch.tensor(float(made.params))
      self.predict = lambda x_BCHW, t_B: scale * x_BCHW
      return
    table = layouts.torch_layout(made.config)
    names = dit.Config.__dataclass_fields__
    values = {name: getattr(made.config, name) for name in names}
    model = dit.DiT(dit.Config(**values))
    model.load_state_dict(
      {
        key: torch.from_numpy(np.array(value))
        for key, value in table.to_theirs(made.params)
      }
    )
    model.eval()
    self.predict = lambda x_BCHW, t_B: model(x_BCHW, t_B, label_B)


def bare(network: Network, count: int) -> Run:
  """Evaluates the network `count` times and does nothing else."""
  times_B = _times(network, np.linspace(1.0, 0.0, count + 1)[:-1])

  @torch.inference_mode()
  def run():
    x_BCHW = network.x_BCHW
    for t_B in times_B:
      x_BCHW = network.predict(x_BCHW, t_B)
    return _like_ours(x_BCHW)

  return run


def sigmas(solver: str, steps: int) -> np.ndarray:
  """Returns the grid of the scheduler: times on the straight path."""
  scheduler = SCHEDULERS[solver]()
  scheduler.set_timesteps(steps)
  return scheduler.sigmas.numpy()


def diffusers_loop(network: Network, solver: str, steps: int) -> Run:
  """Follows diffusers' scheduler, as its pipelines do.

  Setting the timesteps is part of it, as FlowJAX's side pays for its call, too.
  """
  scheduler = SCHEDULERS[solver]()
  times_B = _times(network, sigmas(solver, steps)[:-1])

  @torch.inference_mode()
  def run():
    scheduler.set_timesteps(steps)
    x_BCHW = network.x_BCHW
    for t_B, now in zip(times_B, scheduler.timesteps, strict=True):
      v_BCHW = network.predict(x_BCHW, t_B)
      x_BCHW = scheduler.step(v_BCHW, now, x_BCHW, return_dict=False)[0]
    return _like_ours(x_BCHW)

  return run


def use_threads(count: int) -> None:
  """Has PyTorch work with so many threads."""
  torch.set_num_threads(count)


def versions() -> str:
  """Names the libraries."""
  return f"torch {torch.__version__}, diffusers {diffusers.__version__}"


def _times(network: Network, times: np.ndarray) -> list[torch.Tensor]:
  batch = len(network.x_BCHW)
  return [torch.full((batch,), float(t)) for t in times]


def _like_ours(x_BCHW: torch.Tensor) -> np.ndarray:
  return x_BCHW.numpy().transpose(0, 2, 3, 1)
