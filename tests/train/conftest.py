"""open_gates.py stands beside the tests that begin with it."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
