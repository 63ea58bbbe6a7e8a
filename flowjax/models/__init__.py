"""Networks, behind one seam: plain functions over a plain dict of arrays.

Nobody outside this folder knows with which library a network is written.
"""

import collections.abc
import dataclasses
import functools
from typing import Any

import jax

from flowjax.models import dit

CONFIGS = {"dit": dit.DiTConfig}
_MODULES = {"dit": dit}

Params = dict[str, Any]
Cond = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Network:
  """A network as pure functions of its parameters.

  `apply(params, x_BHWC, t_B, cond, rng=None)` returns v_BHWC in float32. An
  rng says that this is training: conditioning is then dropped now and then,
  so that `unconditional(cond)` means something to the network.
  """

  config: Any
  init: collections.abc.Callable[[jax.Array], Params]
  apply: collections.abc.Callable[..., jax.Array]
  unconditional: collections.abc.Callable[[Cond], Cond]
  flops: int  # forward, per example; a multiply-add is two


def build(config: Any) -> Network:
  """Returns the network that `config` describes."""
  module = _MODULES[config.name]
  return Network(
    config=config,
    init=functools.partial(module.init, config),
    apply=functools.partial(module.apply, config),
    unconditional=functools.partial(module.unconditional, config),
    flops=module.flops(config),
  )
