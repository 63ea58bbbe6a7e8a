"""on_a_mesh.py stands beside the tests that share it."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
