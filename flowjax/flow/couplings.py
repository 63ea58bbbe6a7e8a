"""Couplings: which noise, or which other image, meets which data.

A batch x of data and a batch eps of noise are drawn apart; a coupling makes
pairs of them. Flow matching learns the same marginals under every coupling that
keeps those of x and eps (arXiv:2302.00482, theorem 3.1); what changes is how
straight the paths between them are.

What moves is the noise. x keeps its place, and so does all that belongs to it:
labels stay beside their images, and a batch divided over devices stays as
divided. In the condition, "source" and every key that begins with "source_"
belong to the noise's end, and move along with it.
"""

# Shape suffixes: B batch, D the numbers of one example; BB is one of x times
# one of eps. x and eps have any shape that starts with B.

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.flow import names, paths

Condition = dict[str, jax.Array]
Schedule = Callable[[jax.Array], jax.Array]
Ends = tuple[jax.Array, jax.Array, Condition]
# pair(rng, x, eps, cond, mask_B) -> (x, eps, cond)
Pair = Callable[[jax.Array, jax.Array, jax.Array, Condition, Any], Ends]
# order(rng, x, eps, mask_B) -> order_B: eps[order_B[i]] goes to x[i].
Order = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Spread:
  """Noise about the path between two ends: x_t gains std(t) z, z ~ N(0, 1).

  Its velocity gains std'(t) z: x_t has then three sources, and the velocity
  alone does not determine x and eps any more.
  """

  std: Schedule
  std_dot: Schedule


@dataclasses.dataclass(frozen=True)
class Coupling:
  """A callable (rng, x, eps, cond) -> (x, eps, cond) that pairs x with eps.

  With `mask`, padding (0) is paired with its own noise and changes nothing of
  what real examples (1) receive.
  """

  pair: Pair
  spread: Spread | None = None

  def __call__(
    self,
    rng: jax.Array,
    x: jax.Array,
    eps: jax.Array,
    cond: Condition,
    *,
    mask: jax.Array | None = None,
  ) -> Ends:
    return self.pair(rng, x, eps, cond, mask)


def build(name: str, **options: Any) -> Coupling:
  """Builds the coupling `name` of `COUPLINGS` with the options that it takes.

  Raises ValueError for an unknown name or option, or a value out of range.
  """
  return names.choose("coupling", COUPLINGS, name, options)(**options)


def independent(sigma: float = 0.0) -> Coupling:
  """Builds the coupling that leaves x and eps as they were drawn.

  `sigma` > 0 spreads every x_t by that much (I-CFM, arXiv:2302.00482, eq. 14).
  """
  return Coupling(_as_drawn, _constant(sigma))


def target(sigma_min: float = 1e-2) -> Coupling:
  """Builds the coupling of x + sigma_min eps with eps.

  On the straight path it is Lipman's conditional path about a target x, x_t =
  (1 - t) x + (sigma_min + (1 - sigma_min) t) eps (arXiv:2210.02747, eq. 20),
  that is `paths.straight(sigma_min)`; on another path, its counterpart.
  """
  if not 0.0 <= sigma_min < 1.0:
    raise ValueError(
      f"sigma_min is the noise left in the data: in [0, 1), not {sigma_min}; "
      "0 leaves none."
    )

  def pair(rng, x, eps, cond, mask):
    return x + sigma_min * eps, eps, cond

  return Coupling(pair)


def pairs() -> Coupling:
  """Builds the coupling of stored pairs, data to data: eps := batch["source"].

  Sampling then starts from an image of the source's domain instead of noise:
  rectified flow between two domains where the two are drawn apart, reflow where
  each source was carried to its image (arXiv:2209.03003, sections 2.1 and 2.2).
  The network is not shown the source, only x_t.
  """

  def pair(rng, x, eps, cond, mask):
    if "source" not in cond or cond["source"].shape != x.shape:
      found = cond["source"].shape if "source" in cond else sorted(cond)
      raise ValueError(
        'The coupling "pairs" takes the end at t = 1 from batch["source"], of '
        f'the shape {x.shape} of batch["image"]; found {found}.'
      )
    rest = {key: cond[key] for key in cond if key != "source"}
    return x, cond["source"].astype(eps.dtype), rest

  return Coupling(pair)


def optimal_transport(sigma: float = 0.0) -> Coupling:
  """Builds the permutation of eps that minimises sum_i |x_i - eps_i|^2.

  Minibatch optimal transport, OT-CFM (arXiv:2302.00482, section 3.2.3): the
  exact assignment by SciPy, on the host, of the whole batch on all devices.
  Its time grows as B^3. Costs that are not finite leave the pairs as drawn, and
  the loss to say so.
  """
  _import("scipy.optimize", "scipy", "optimal_transport")

  def order(rng, x, eps, mask_B):
    cost_BB = _cost(x, eps)
    order_B = jax.ShapeDtypeStruct(mask_B.shape, jnp.int32)
    return jax.pure_callback(
      _assign, order_B, cost_BB, mask_B, vmap_method="sequential"
    )

  return Coupling(_moving(order), _constant(sigma))


def sinkhorn(
  epsilon: float = 0.05,
  *,
  relative: bool = True,
  sigma: float = 0.0,
  max_iterations: int = 2000,
) -> Coupling:
  """Builds the entropic plan of the batch, and draws from it an eps for each x.

  P = argmin <P, C> - epsilon H(P), C_ij = |x_i - eps_j|^2, by ott-jax, on the
  device. `relative` measures epsilon in units of the mean of C, which grows
  with the number of pixels. Each x is used once, an eps on the average once; as
  epsilon falls to 0 this becomes `optimal_transport`.
  """
  _above_zero("sinkhorn", "epsilon", epsilon)
  _above_zero("sinkhorn", "max_iterations", max_iterations)
  _import("ott", "ott-jax", "sinkhorn")

  def order(rng, x, eps, mask_B):
    log_plan_BB = entropic_plan(
      _cost(x, eps), mask_B, epsilon, relative, max_iterations
    )
    rng_B = jax.random.split(rng, mask_B.shape[0])
    # One key per row: what a row draws depends on no other row.
    return jax.vmap(jax.random.categorical)(rng_B, log_plan_BB)

  return Coupling(_moving(order), _constant(sigma))


def schrodinger_bridge(sigma: float = 1.0, plan: str = "entropic") -> Coupling:
  """Builds SB-CFM's coupling, that of a Brownian bridge of variance sigma^2.

  The entropic plan with epsilon = 2 sigma^2 (or the "exact" one), and about the
  path of each pair a spread (arXiv:2302.00482, section 3.2.4):

    x_t = alpha x + sigma_path eps + sigma sqrt(t (1 - t)) z
    v   = alpha' x + sigma_path' eps + sigma (1 - 2 t) / (2 sqrt(t (1 - t))) z

  On the straight path, the marginals of the Schrodinger bridge between noise
  and data. The last term is infinite at both ends; there it is taken down to 0
  within 1e-8 of them.
  """
  _above_zero("schrodinger_bridge", "sigma", sigma)
  if plan not in ("entropic", "exact"):
    raise ValueError(
      f"The plan of schrodinger_bridge is 'entropic' or 'exact', not {plan!r}."
    )

  def std(t):
    return sigma * jnp.sqrt(t * (1.0 - t))

  def std_dot(t):
    return std(t) * (1.0 - 2.0 * t) / (2.0 * t * (1.0 - t) + 1e-8)

  if plan == "exact":
    base = optimal_transport()
  else:
    base = sinkhorn(2.0 * sigma**2, relative=False)
  return Coupling(base.pair, Spread(std, std_dot))


def chain(first: Coupling, second: Coupling) -> Coupling:
  """Builds `second` of the ends that `first` returns.

  chain(pairs(), optimal_transport()) couples two domains of images.
  """
  if first.spread and second.spread:
    raise ValueError("Of two couplings in a chain only one may spread x_t.")

  def pair(rng, x, eps, cond, mask):
    rng_first, rng_second = jax.random.split(rng)
    ends = first.pair(rng_first, x, eps, cond, mask)
    return second.pair(rng_second, *ends, mask)

  return Coupling(pair, first.spread or second.spread)


# Factories of couplings, by the name that a config gives them.
COUPLINGS: dict[str, Callable[..., Coupling]] = {
  "independent": independent,
  "target": target,
  "pairs": pairs,
  "optimal_transport": optimal_transport,
  "sinkhorn": sinkhorn,
  "schrodinger_bridge": schrodinger_bridge,
}


def entropic_plan(
  cost_BB: jax.Array,
  mask_B: jax.Array,
  epsilon: float,
  relative: bool = False,
  max_iterations: int = 2000,
) -> jax.Array:
  """Returns log P, -inf where padding would meet what is real.

  Sinkhorn's iterations among logarithms; real rows and columns weigh alike.
  """
  from ott.geometry import geometry
  from ott.problems.linear import linear_problem
  from ott.solvers.linear import sinkhorn as solver

  # Chosen, not multiplied: what padding costs may not be finite.
  real_BB = mask_B[:, None] & mask_B[None, :]
  cost_BB = jnp.where(real_BB, cost_BB, 0.0)
  if relative:
    mean = jnp.sum(cost_BB) / jnp.maximum(jnp.sum(real_BB), 1)
    cost_BB = cost_BB / jnp.maximum(mean, jnp.finfo(cost_BB.dtype).tiny)
  share_B = mask_B / jnp.maximum(jnp.sum(mask_B), 1)
  costs = geometry.Geometry(cost_matrix=cost_BB, epsilon=epsilon)
  # ott-jax broadcasts over ranks, whatever its caller has forbidden.
  with jax.numpy_rank_promotion("allow"):
    found = solver.Sinkhorn(max_iterations=max_iterations)(
      linear_problem.LinearProblem(costs, share_B, share_B)
    )
  log_plan_BB = (found.f[:, None] + found.g[None, :] - cost_BB) / epsilon
  return jnp.where(real_BB, log_plan_BB, -jnp.inf)


def _as_drawn(rng, x, eps, cond, mask) -> Ends:
  return x, eps, cond


def _moving(order: Order) -> Pair:
  """Returns the pairing that moves the noise's end as `order` says."""

  def pair(rng, x, eps, cond, mask):
    own_B = jnp.arange(x.shape[0])
    mask_B = own_B >= 0 if mask is None else mask.astype(bool)
    order_B = jnp.where(mask_B, order(rng, x, eps, mask_B), own_B)
    moved = {
      key: value[order_B] if _at_source(key) else value
      for key, value in cond.items()
    }
    return x, eps[order_B], moved

  return pair


def _at_source(key: str) -> bool:
  return key == "source" or key.startswith("source_")


def _cost(x: jax.Array, eps: jax.Array) -> jax.Array:
  """Returns |x_i - eps_j|^2, in float32 on every accelerator.

  A constant to gradients: a pairing has none.
  """
  x, eps = jax.lax.stop_gradient((x, eps))
  x_BD, eps_BD = (paths.wide(a).reshape(a.shape[0], -1) for a in (x, eps))
  product_BB = jnp.matmul(x_BD, eps_BD.T, precision="highest")
  x_B, eps_B = (jnp.sum(jnp.square(a), axis=1) for a in (x_BD, eps_BD))
  return jnp.maximum(x_B[:, None] + eps_B[None, :] - 2.0 * product_BB, 0.0)


def _assign(cost_BB, mask_B) -> np.ndarray:
  """Solves the assignment among real examples; numpy alone, on the host."""
  import scipy.optimize

  order_B = np.arange(len(mask_B), dtype=np.int32)
  real = np.flatnonzero(np.asarray(mask_B))
  cost = np.asarray(cost_BB)[np.ix_(real, real)]
  if np.isfinite(cost).all():
    _, columns = scipy.optimize.linear_sum_assignment(cost)
    order_B[real] = real[columns]
  return order_B


def _constant(sigma: float) -> Spread | None:
  if not 0.0 <= sigma < math.inf:
    raise ValueError(
      f"sigma spreads x_t about its path and may not be {sigma}; 0 is none."
    )
  if sigma == 0.0:
    return None
  return Spread(lambda t: jnp.full_like(t, sigma), jnp.zeros_like)


def _above_zero(coupling: str, name: str, value: float) -> None:
  if not 0 < value < math.inf:
    raise ValueError(f"{name} of {coupling} must be above 0, not {value}.")


def _import(module: str, package: str, coupling: str) -> None:
  try:
    importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f"The coupling {coupling!r} needs {package}, which is not installed: "
      "pip install -e '.[couplings]'."
    ) from error
