"""What a network is to the rest of the house: functions of its parameters."""

# Shape suffixes: B batch, H height, W width, C channels.

import collections.abc
import dataclasses
from typing import Any

import jax

Params = dict[str, Any]
Cond = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Network:
  """A network as pure functions of its parameters.

  `apply(params, x_BHWC, t_B, cond, rng=None)` returns v_BHWC in float32. An
  rng says that this is training: conditioning is then dropped now and then,
  so that `unconditional(cond)` means something to the network.

  A normalizing flow has `forward(params, x_BHWC, cond, rng=None)`, which
  returns z_BHWC and log|det dz/dx| [B], and `inverse(params, z_BHWC, cond)`,
  which returns x_BHWC; its `apply` refuses. Other networks have neither.
  """

  config: Any
  init: collections.abc.Callable[[jax.Array], Params]
  apply: collections.abc.Callable[..., jax.Array]
  unconditional: collections.abc.Callable[[Cond], Cond]
  flops: int  # forward, per example; a multiply-add is two
  example: collections.abc.Callable[[int], Cond]  # A condition of zeros.
  # dropped(cond, rng): as training drops it, each example by itself.
  dropped: collections.abc.Callable[[Cond, jax.Array], Cond]
  forward: collections.abc.Callable[..., tuple] | None = None
  inverse: collections.abc.Callable[..., jax.Array] | None = None
  uncertainty: collections.abc.Callable[..., jax.Array] | None = None
  encode: collections.abc.Callable[..., tuple] | None = None
  decode: collections.abc.Callable[..., jax.Array] | None = None
  reconstruct: collections.abc.Callable[..., Any] | None = None
  last: collections.abc.Callable[..., jax.Array] | None = None
  # From all parameters to those of the network as it was built.
  own: collections.abc.Callable[[Params], Params] = lambda params: params
  # From all parameters and a condition to what the network as it was built is
  # told.
  told: collections.abc.Callable[[Params, Cond], Cond] = lambda _, cond: cond
