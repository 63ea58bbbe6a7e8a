"""Weights in and out: key tables, safetensors, exports to PyTorch."""
