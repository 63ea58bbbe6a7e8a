"""The mathematics of flows: pure functions that know nothing but jax."""
