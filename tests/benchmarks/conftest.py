"""The scripts of benchmarks/ import each other by name, as scripts do."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
