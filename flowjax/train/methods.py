"""What `config.sample` says, and the method that it stands for."""

import dataclasses
import math
from typing import Any

from flowjax.flow import (
  grids,
  guidance_rules,
  paths,
  sampling,
  solvers,
)
from flowjax.train import flows


def _group(kind: Any) -> Any:
  return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True)
class SolverConfig:
  """A solver, as named in flow/solvers, with the options of its factory."""

  name: str = "heun"
  order: int | None = None
  variant: str | None = None
  form: str | None = None
  lower_order_final: bool | None = None
  compat: bool | None = None
  eta: float | None = None
  variance: str | None = None
  clip: float | None = None
  churn: float | None = None
  s_min: float | None = None
  s_max: float | None = None
  s_noise: float | None = None
  diffusion: str | None = None
  scale: float | None = None
  last_step: str | None = None
  last_step_size: float | None = None
  rtol: float | None = None
  atol: float | None = None
  max_steps: int | None = None


@dataclasses.dataclass(frozen=True)
class GridConfig:
  """The times that a solver visits, as named in flow/grids.py."""

  name: str = "uniform"
  shift: float | None = None
  rho: float | None = None
  sigma_min: float | None = None
  sigma_max: float | None = None
  a: float | None = None
  b: float | None = None
  table: int | None = None
  offset: int | None = None
  multistep: bool | None = None
  mu: float | None = None
  mu_form: str | None = None
  source: str | None = None
  terminal: float | None = None
  spacing: str | None = None
  compat: bool | None = None


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
  """How samples are drawn towards their condition (flow/guidance_rules.py).

  Scale 1 is the plain conditional field. Guidance acts for t inside `interval`.
  Before it, the first `zero_init_steps` do not move (CFG-Zero*). Skip-layer
  guidance pushes away from the network without its blocks `skip_layers`, by
  `skip_scale`, inside `skip_interval`.
  """

  name: str = "cfg"
  scale: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  factor: float | None = None
  eta: float | None = None
  norm_threshold: float | None = None
  momentum: float | None = None
  zero_init_steps: int = 0
  skip_layers: tuple[int, ...] = ()
  skip_scale: float = 0.0
  skip_interval: tuple[float, float] = (0.0, 1.0)

  def __post_init__(self):
    if not math.isfinite(self.scale):
      raise ValueError(
        f"scale = {self.scale} must be a finite number; 1 is no guidance."
      )
    for name in ("interval", "skip_interval"):
      low, high = getattr(self, name)
      if not 0 <= low <= high <= 1:
        raise ValueError(
          f"{name} = {(low, high)} must be two times, 0 <= low <= high <= 1."
        )
    if bool(self.skip_layers) != bool(self.skip_scale):
      raise ValueError(
        f"skip_layers = {self.skip_layers} and skip_scale = {self.skip_scale} "
        "need each other: SD3.5 skips (7, 8, 9) by 2.5."
      )
    if self.zero_init_steps < 0:
      raise ValueError(
        f"zero_init_steps = {self.zero_init_steps} is below 0; 0 is none."
      )


AS_TRAINED = "as_trained"


@dataclasses.dataclass(frozen=True)
class FollowedConfig(flows.PathConfig):
  """The path that samples follow: that of training, or another.

  A network trained on one path is a field on any other, at equal log-SNR
  (`flow.prediction.rescheduled`).
  """

  name: str = AS_TRAINED

  def __post_init__(self):
    self.another()

  def another(self) -> paths.Path | None:
    """Returns the path where it is not that of training."""
    if self.name != AS_TRAINED:
      return self.build()
    if chosen := flows.options(self):
      raise ValueError(
        f"{', '.join(chosen)} of the path {AS_TRAINED!r}: samples follow the "
        "path of training as it is. To follow another, name it, such as "
        "path.name='straight'."
      )
    return None


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How samples are drawn: path, solver, grid of times, guidance."""

  steps: int = 50
  path: FollowedConfig = _group(FollowedConfig)
  solver: SolverConfig = _group(SolverConfig)
  grid: GridConfig = _group(GridConfig)
  guidance: GuidanceConfig = _group(GuidanceConfig)

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps = {self.steps} must be at least 1.")
    if self.guidance.zero_init_steps >= self.steps:
      raise ValueError(
        f"guidance.zero_init_steps = {self.guidance.zero_init_steps} of "
        f"steps = {self.steps}: at least one step must move."
      )
    self._rule()

  def method(self, flow: flows.FlowConfig) -> sampling.Method:
    """Returns how networks trained by `flow` are sampled.

    Raises ValueError for a solver or a grid that this path does not allow.
    """
    trained_on, another = flow.path.build(), self.path.another()
    path, chosen = another or trained_on, self.guidance
    grid = grids.build(
      self.grid.name, path, self.steps, **flows.options(self.grid)
    )
    return sampling.Method(
      path=path,
      prediction=flow.prediction,
      solver=solvers.build(
        self.solver.name, path, **flows.options(self.solver)
      ),
      grid=grid,
      rule=self._rule(),
      interval=chosen.interval,
      still_steps=chosen.zero_init_steps,
      push_scale=chosen.skip_scale,
      push_interval=chosen.skip_interval,
      sigma_data=flow.sigma_data,
      trained_on=trained_on if another else None,
    )

  def _rule(self) -> guidance_rules.Rule:
    rule = ("scale", "factor", "eta", "norm_threshold", "momentum")
    chosen = flows.options(self.guidance)
    return guidance_rules.build(
      self.guidance.name, **{key: chosen[key] for key in rule if key in chosen}
    )
