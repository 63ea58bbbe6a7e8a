"""What `config.flow` says, and the functions that it stands for.

Each group names one entry of a table of flow/ and gives its options. An option
that is None is as the entry has it by default; one that the entry does not take
is refused, so that no number in a config is without effect.
"""

import collections.abc
import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from flowjax import models, schema
from flowjax.flow import (
  couplings,
  distances,
  grids,
  likelihood,
  losses,
  maximum_likelihood,
  objective,
  paths,
  prediction,
  solvers,
  times,
  variance,
  weights,
)

OBJECTIVES = ("matching", "maximum_likelihood")
# Couplings after which x_t is not alpha x + sigma eps of an eps that is normal
# and drawn apart.
DEPENDENT = (
  "target",
  "optimal_transport",
  "sinkhorn",
  "schrodinger_bridge",
  "pairs",
)


def _group(kind: Any) -> Any:
  return dataclasses.field(default_factory=kind)


def options(config: Any, *without: str) -> dict[str, Any]:
  """Returns the options of a group that are set, but for its name."""
  return {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in ("name", *without)
    and getattr(config, field.name) is not None
  }


@dataclasses.dataclass(frozen=True)
class PathConfig:
  """A path from data to noise, as named in flow/paths.py.

  `low` and `high` narrow the times that training and sampling visit.
  """

  name: str = "straight"
  sigma_min: float | None = None
  sigma_max: float | None = None
  rho: float | None = None
  beta_min: float | None = None
  beta_max: float | None = None
  beta_start: float | None = None
  beta_end: float | None = None
  steps: int | None = None
  s: float | None = None
  power: float | None = None
  zero_terminal_snr: bool | None = None
  low: float | None = None
  high: float | None = None

  def __post_init__(self):
    self.build()

  def build(self) -> paths.Path:
    """Returns the path."""
    return paths.build(self.name, **options(self))


@dataclasses.dataclass(frozen=True)
class LawConfig:
  """The law of t in training, as named in flow/times.py.

  `mean` and `std` are those of logit t or of log sigma. `shift` is the
  resolution shift (arXiv:2403.03206, eq. 23), applied after the law; 1 is none.
  `shift_by` multiplies it by a rule for the length of the sequence: "sd3",
  sqrt(tokens / base_tokens), or "flux", its exp(mu).
  """

  name: str = "logit_normal"
  mean: float | None = None
  std: float | None = None
  scale: float | None = None
  a: float | None = None
  b: float | None = None
  compat: bool | None = None
  shift: float = 1.0
  shift_by: str | None = None
  base_tokens: int | None = None
  stratified: bool = False

  def build(self, path: paths.Path, tokens: int | None) -> times.TimeLaw:
    """Returns the law, on a path where it is one of sigma."""
    chosen = options(self, "shift_by", "base_tokens")
    chosen["shift"] *= shift_by(self, tokens)
    return times.build(self.name, path, **chosen)


def shift_by(config: Any, tokens: int | None) -> float:
  """Returns the shift of a group's rule `shift_by`, for so many tokens."""
  chosen = (
    {} if config.base_tokens is None else {"base_tokens": config.base_tokens}
  )
  if config.shift_by is None:
    if chosen:
      raise ValueError(
        f"base_tokens = {config.base_tokens} is an option of shift_by, which "
        "is not set: 'sd3' or 'flux'."
      )
    return 1.0
  if tokens is None:
    raise ValueError(
      f"shift_by = {config.shift_by!r} is for transformers, and this network "
      "has no tokens."
    )
  return times.shift_by(config.shift_by, tokens, **chosen)


def tokens_of(model: Any) -> int | None:
  """Returns the number of tokens of an image in a model, if it has any."""
  return math.prod(model.grid) if hasattr(model, "grid") else None


@dataclasses.dataclass(frozen=True)
class WeightConfig:
  """The weight of the error at t, as named in flow/weights.py."""

  name: str = "unit"
  gamma: float | None = None
  k: float | None = None


@dataclasses.dataclass(frozen=True)
class DistanceConfig:
  """How far from its target an output is, as named in flow/distances.py."""

  name: str = "l2"
  c: float | None = None
  of: str | None = None
  scale: float | None = None
  floor: float | None = None

  def __post_init__(self):
    self.build()

  def build(self) -> distances.Distance:
    """Returns the distance."""
    return distances.build(self.name, **options(self))


@dataclasses.dataclass(frozen=True)
class CouplingConfig:
  """Which noise meets which data, as named in flow/couplings.py.

  After "pairs", `then` may couple the two ends further, as by
  "optimal_transport", whose options these are.
  """

  name: str = "independent"
  then: str | None = None
  sigma: float | None = None
  sigma_min: float | None = None
  epsilon: float | None = None
  relative: bool | None = None
  max_iterations: int | None = None
  plan: str | None = None

  def __post_init__(self):
    self.build()

  def build(self) -> couplings.Coupling:
    """Returns the coupling."""
    chosen = options(self, "then")
    if self.then is None:
      return couplings.build(self.name, **chosen)
    if self.name != "pairs" or self.then == "pairs":
      raise ValueError(
        f"then = {self.then!r} after the coupling {self.name!r}: it is for "
        "'pairs' alone, to couple them further, as by 'optimal_transport'."
      )
    return couplings.chain(
      couplings.pairs(), couplings.build(self.then, **chosen)
    )


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
  """How log p is found along the ODE (flow/likelihood.py).

  `divergence` is "hutchinson", with so many `probes`, or "exact", which costs
  one derivative per value of an image.
  """

  solver: str = "rk4"
  steps: int = 8
  divergence: str = "hutchinson"
  probes: int = 1

  def __post_init__(self):
    _member("divergence", self.divergence, ("hutchinson", "exact"))
    if self.steps < 1:
      raise ValueError(f"steps = {self.steps} must be at least 1.")
    self.way()
    solver = solvers.build(self.solver, paths.straight())
    if solver.prediction != "velocity" or getattr(solver, "stochastic", False):
      raise ValueError(
        f"solver = {self.solver!r} does not follow a velocity alone; take one "
        "that does, such as 'rk4' or 'dopri5'."
      )

  def way(self) -> likelihood.Divergence:
    """Returns the way to the divergence."""
    if self.divergence == "exact":
      return likelihood.exact()
    return likelihood.hutchinson(probes=self.probes)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
  """A way from data to noise, what the network predicts on it, and the loss.

  `prediction` is one of flow/prediction.py; `sigma_data` is the standard
  deviation of the data, which "edm" needs. With `learned_variance` the network
  gives twice the channels and the loss is iDDPM's hybrid; with `uncertainty`
  EDM2's u(t) is learned beside it and balances the loss over t. The objective
  "maximum_likelihood" is exact for a network that is invertible, and goes along
  the ODE for one that predicts; `levels` is then how many values a pixel has.
  """

  objective: str = "matching"
  path: PathConfig = _group(PathConfig)
  prediction: str = "velocity"
  sigma_data: float = 0.5
  law: LawConfig = _group(LawConfig)
  weight: WeightConfig = _group(WeightConfig)
  distance: DistanceConfig = _group(DistanceConfig)
  coupling: CouplingConfig = _group(CouplingConfig)
  learned_variance: bool = False
  uncertainty: bool = False
  levels: int | None = None
  likelihood: LikelihoodConfig = _group(LikelihoodConfig)

  def __post_init__(self):
    _member("objective", self.objective, OBJECTIVES)
    _member("prediction", self.prediction, prediction.PREDICTIONS)
    if self.levels is not None and self.levels < 2:
      raise ValueError(
        f"levels = {self.levels} values of a pixel; 256 for images of 8 bits."
      )
    if not self.sigma_data > 0:
      raise ValueError(f"sigma_data = {self.sigma_data} must be above 0.")
    path = self.path.build()
    self.law.build(path, tokens=1)
    self._weight(path)
    objective.Objective(
      path, self.prediction, self.coupling.build(), self.sigma_data
    )
    if self.learned_variance and path.steps is None:
      raise ValueError(
        f"learned_variance is that of the steps of a table, which the path "
        f"{path.name!r} is not: take 'ddpm', 'scaled_linear' or 'cosine' with "
        "path.steps=1000."
      )
    if self.learned_variance and (
      self.uncertainty
      or self.prediction == "edm"
      or self.coupling.name != "independent"
    ):
      raise ValueError(
        "learned_variance is a loss of its own, of noise that is drawn apart "
        "from the data: not with uncertainty, with the prediction 'edm', or "
        f"with the coupling {self.coupling.name!r}."
      )
    if self.objective == "maximum_likelihood":
      self._check_likelihood()

  def _check_likelihood(self):
    """Refuses what the log-density of the data does not depend on."""
    plain = FlowConfig()
    for name in (
      "law",
      "weight",
      "distance",
      "coupling",
      "learned_variance",
      "uncertainty",
    ):
      if getattr(self, name) != getattr(plain, name):
        raise ValueError(
          f"{name} belongs to the objective 'matching' and would be without "
          "effect under 'maximum_likelihood'; leave it as it is by default."
        )

  def loss(self, network: models.Network) -> losses.Loss:
    """Returns the training loss of a network."""
    if self._by_likelihood(network):
      return self.bits(network, training=True)
    path = self.path.build()
    law = self.law.build(path, tokens_of(network.config))
    weight = self._weight(path)
    if self.learned_variance:
      return losses.hybrid(
        network.apply,
        path,
        law,
        prediction=self.prediction,
        weight=weight,
        distance=self.distance.build(),
      )
    predict = self.predictor(network)
    if network.uncertainty is not None:
      u, value = network.uncertainty, predict

      def both(params, x_t, t_B, *rest):
        return value(params, x_t, t_B, *rest), u(params, t_B)

      return losses.uncertain(both, path, law, weight=weight, **self._space())
    return losses.matching(predict, path, law, weight=weight, **self._space())

  def validation_loss(self, network: models.Network) -> losses.Loss:
    """Returns the loss at eight fixed timesteps, t = (i + 0.5) / 8.

    Where the objective is maximum likelihood, the bits per dimension.
    """
    if self._by_likelihood(network):
      return self.bits(network)
    return losses.fixed_time(
      self.predictor(network), self.path.build(), **self._space()
    )

  def bits(
    self, network: models.Network, *, training: bool = False
  ) -> losses.Loss:
    """Returns the bits per dimension as a loss: exact, or along the ODE."""
    forward = network.forward or self._along_the_ode(network, training)
    return maximum_likelihood.maximum_likelihood(
      forward, levels=self.levels, training=training or network.forward is None
    )

  def _by_likelihood(self, network: models.Network) -> bool:
    if network.forward is None:
      return self.objective == "maximum_likelihood"
    if self.objective != "maximum_likelihood":
      raise ValueError(
        f"flow.objective = {self.objective!r}: a network of coupling layers is "
        "trained by 'maximum_likelihood'."
      )
    return True

  def _along_the_ode(self, network: models.Network, training: bool):
    """Returns the ODE as forward(params, x, cond, rng) -> (z, log|det|)."""
    chosen, path = self.likelihood, self.path.build()
    solver = solvers.build(chosen.solver, path)
    times = jnp.asarray(grids.uniform(path, chosen.steps)[::-1].copy())
    predict, kind = self.predictor(network), self.prediction
    scale_of_data = self.sigma_data

    def velocity(params, x, t_B, cond, rng):
      # One key for the whole solve: what is dropped stays dropped.
      value = predict(params, x, t_B, cond, rng if training else None)
      return prediction.convert(
        path, kind, "velocity", value, x, t_B, sigma_data=scale_of_data
      )

    def forward(params, x, cond, rng):
      def field(x, t):
        t_B = jnp.broadcast_to(t, x.shape[:1])
        return velocity(params, x, t_B, cond, rng)

      # The divergence is a derivative along probes.
      with models.forward_mode():
        end, change_B = likelihood.transport(
          field, x, times, solver, chosen.way(), rng
        )
      scale = path.prior_scale
      return end / scale, change_B - math.prod(x.shape[1:]) * math.log(scale)

    return forward

  def predictor(
    self, network: models.Network, *, with_variance: bool = False
  ) -> losses.Predictor:
    """Returns predict(params, x_t, t_B, cond, rng), of `prediction` alone.

    That of a network which learns its variance gives, `with_variance`, the pair
    (prediction, v).
    """
    if with_variance:
      return variance.apart(network.apply)
    return self.prepared(network.apply)

  def prepared(self, predict: losses.Predictor) -> losses.Predictor:
    """Returns `predict` of a network as this flow's prediction wants it."""
    if self.learned_variance:
      predict = variance.predicted(predict)
    return prediction.preconditioned(
      predict, self.path.build(), self.prediction, sigma_data=self.sigma_data
    )

  def _space(self) -> dict[str, Any]:
    return {
      "prediction": self.prediction,
      "distance": self.distance.build(),
      "coupling": self.coupling.build(),
      "sigma_data": self.sigma_data,
    }

  def _weight(self, path: paths.Path) -> losses.Weight | None:
    if self.weight.name == "unit":
      return None
    return weights.build(
      self.weight.name,
      path,
      self.prediction,
      sigma_data=self.sigma_data,
      **options(self.weight),
    )


def _member(name: str, value: str, table: collections.abc.Iterable[str]):
  if value not in table:
    raise ValueError(f"{name} = {value!r}. {schema.closest(value, table)}")
