"""Pure JAX operations with several bodies behind one signature."""
