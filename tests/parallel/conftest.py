"""goldens.py stands beside its tests, and is a script as well."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
