"""What `config.sample` says, and the method that it stands for."""

import dataclasses
import math
from typing import Any

import numpy as np

from flowjax import errors, models, schema
from flowjax.flow import (
  grids,
  guidance,
  guidance_rules,
  paths,
  prediction,
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


# Grids that a shift moves towards noise.
SHIFTED = ("uniform", "flow_match")


@dataclasses.dataclass(frozen=True)
class GridConfig:
  """The times that a solver visits, as named in flow/grids.py.

  `shift_by` multiplies the shift by a rule for the length of the sequence, as
  in the law of t.
  """

  name: str = "uniform"
  shift: float | None = None
  shift_by: str | None = None
  base_tokens: int | None = None
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

  def build(
    self, path: paths.Path, steps: int, tokens: int | None
  ) -> np.ndarray:
    """Returns the times, for images of so many tokens."""
    chosen = flows.options(self, "shift_by", "base_tokens")
    factor = flows.shift_by(self, tokens)
    if self.shift_by is not None:
      if self.name not in SHIFTED or self.mu is not None:
        raise ValueError(
          f"grid.shift_by = {self.shift_by!r} shifts the grids "
          f"{', '.join(SHIFTED)}, and in place of mu; not {self.name!r}"
          f"{'' if self.mu is None else f' with mu = {self.mu}'}."
        )
      chosen["shift"] = chosen.get("shift", 1.0) * factor
    return grids.build(self.name, path, steps, **chosen)


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
  """How samples are drawn towards their condition (flow/guidance_rules.py).

  Scale 1 is the plain conditional field. Guidance acts for t inside `interval`.
  Before it, the first `zero_init_steps` do not move (CFG-Zero*). Skip-layer
  guidance pushes away from the network without its blocks `skip_layers`, by
  `skip_scale`, inside `skip_interval`; perturbed attention guidance from the
  one whose tokens attend to themselves alone in `perturbed_layers`.
  """

  name: str = "cfg"
  scale: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  factor: float | None = None
  space: str | None = None
  eta: float | None = None
  norm_threshold: float | None = None
  momentum: float | None = None
  zero_init_steps: int = 0
  skip_layers: tuple[int, ...] = ()
  skip_scale: float = 0.0
  skip_interval: tuple[float, float] = (0.0, 1.0)
  perturbed_layers: tuple[int, ...] = ()
  perturbed_scale: float = 0.0
  perturbed_interval: tuple[float, float] = (0.0, 1.0)

  def __post_init__(self):
    if self.space is not None and self.space not in prediction.PREDICTIONS:
      raise ValueError(
        f"space = {self.space!r} is no prediction that a rule can act on. "
        f"{schema.closest(self.space, prediction.PREDICTIONS)}"
      )
    for name, none in (("scale", 1), ("skip_scale", 0), ("perturbed_scale", 0)):
      value = getattr(self, name)
      if not math.isfinite(value):
        raise ValueError(
          f"{name} = {value} must be a finite number; {none} is no guidance."
        )
    for name in ("interval", "skip_interval", "perturbed_interval"):
      low, high = getattr(self, name)
      if not 0 <= low <= high <= 1:
        raise ValueError(
          f"{name} = {(low, high)} must be two times, 0 <= low <= high <= 1."
        )
    for name in ("skip", "perturbed"):
      interval = getattr(self, f"{name}_interval")
      if interval != (0.0, 1.0) and not getattr(self, f"{name}_layers"):
        raise ValueError(
          f"{name}_interval = {interval} has no effect without {name}_layers."
        )
    if bool(self.skip_layers) != bool(self.skip_scale):
      raise ValueError(
        f"skip_layers = {self.skip_layers} and skip_scale = {self.skip_scale} "
        "need each other: SD3.5 skips (7, 8, 9) by 2.5."
      )
    if bool(self.perturbed_layers) != bool(self.perturbed_scale):
      raise ValueError(
        f"perturbed_layers = {self.perturbed_layers} and perturbed_scale = "
        f"{self.perturbed_scale} need each other: blocks in the middle of the "
        "network, by 3.0."
      )
    if self.zero_init_steps < 0:
      raise ValueError(
        f"zero_init_steps = {self.zero_init_steps} is below 0; 0 is none."
      )

  def pushes(self, network: models.Network) -> list[guidance.Push]:
    """Returns the pushes, each away from `apply` of a degraded network.

    Raises UserError for a block that the network does not have.
    """
    found = []
    for name, degrade in (
      ("skip", models.without_layers),
      ("perturbed", models.with_identity_attention),
    ):
      layers, scale, interval = (
        getattr(self, f"{name}_{what}")
        for what in ("layers", "scale", "interval")
      )
      if layers:
        with errors.naming(f"config.sample.guidance.{name}_layers"):
          degraded = degrade(network, layers)
        found.append(guidance.Push(degraded, scale, interval))
    return found


AS_TRAINED = "as_trained"
MOST_STEPS = 100_000


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
    if not 1 <= self.steps <= MOST_STEPS:
      raise ValueError(
        f"steps = {self.steps} must be at least 1, and at most {MOST_STEPS}."
      )
    if self.guidance.zero_init_steps >= self.steps:
      raise ValueError(
        f"guidance.zero_init_steps = {self.guidance.zero_init_steps} of "
        f"steps = {self.steps}: at least one step must move."
      )
    self._rule()

  def method(
    self, flow: flows.FlowConfig, tokens: int | None = None
  ) -> sampling.Method:
    """Returns how networks trained by `flow` are sampled.

    `tokens` is the number of those of an image, for a shift that depends on it.
    Raises ValueError for a solver or a grid that this path does not allow.
    """
    trained_on, another = flow.path.build(), self.path.another()
    path, chosen = another or trained_on, self.guidance
    return sampling.Method(
      path=path,
      prediction=flow.prediction,
      solver=self._solver(path, flow),
      grid=self.grid.build(path, self.steps, tokens),
      rule=self._rule(),
      interval=chosen.interval,
      still_steps=chosen.zero_init_steps,
      sigma_data=flow.sigma_data,
      trained_on=trained_on if another else None,
    )

  def _solver(self, path: paths.Path, flow: flows.FlowConfig) -> solvers.Solver:
    solver = solvers.build(self.solver.name, path, **flows.options(self.solver))
    if getattr(solver, "learns_variance", False) and not flow.learned_variance:
      raise ValueError(
        f"solver.variance = {self.solver.variance!r}: this network learns no "
        "variance. Take 'small' or 'large', or train one that does, with "
        "flow.learned_variance=True and model.out_channels twice the channels "
        "(the preset 'iddpm')."
      )
    return solver

  def _rule(self) -> guidance_rules.Rule:
    rule = ("scale", "factor", "space", "eta", "norm_threshold", "momentum")
    chosen = flows.options(self.guidance)
    return guidance_rules.build(
      self.guidance.name, **{key: chosen[key] for key in rule if key in chosen}
    )
