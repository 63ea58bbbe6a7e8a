"""How uncertain a network is at each t, learned beside it (EDM2)."""

# Shape suffixes: B batch, F frequencies.

import jax
import jax.numpy as jnp
import numpy as np

FREQUENCIES = 128


def init() -> dict[str, jax.Array]:
  """Returns the parameters: the same uncertainty, u = 0, at every t."""
  return {"kernel": jnp.zeros((FREQUENCIES,), jnp.float32)}


def apply(params: dict[str, jax.Array], t_B: jax.Array) -> jax.Array:
  """Returns u_B, a sum of waves in t of fixed random frequencies.

  EDM2's (arXiv:2312.02696, appendix B.3): one linear layer of random Fourier
  features, N(0, 1) turns over the range of t.
  """
  random = np.random.default_rng(0)
  turns_F = random.standard_normal(FREQUENCIES).astype(np.float32)
  phase_F = random.random(FREQUENCIES).astype(np.float32)
  turned_BF = t_B[:, None].astype(jnp.float32) * turns_F[None, :]
  angle_BF = 2.0 * np.pi * (turned_BF + phase_F[None, :])
  waves_BF = np.sqrt(2.0 / FREQUENCIES) * jnp.cos(angle_BF)
  return waves_BF @ params["kernel"]
