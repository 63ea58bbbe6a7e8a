"""PyTorch sources that exports carry with them; nothing here imports ours."""
