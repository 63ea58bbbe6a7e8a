"""Imports point down, and the light rooms stay light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "flowjax"

# Who may import whom. errors and schema know nothing and serve all but the
# two rooms that stand on jax alone.
PLAIN = {"errors", "schema"}
ALLOWED = {
  "flow": {"flow"},
  "ops": {"ops"},
  "models": {"models", "ops"} | PLAIN,
  "parallel": {"parallel", "ops"} | PLAIN,
  "data": {"data"} | PLAIN,
  "train": {"train", "data", "parallel", "models", "flow"} | PLAIN,
  "evaluate": {"evaluate", "models", "flow"} | PLAIN,
  "interop": {"interop", "data", "parallel", "models"} | PLAIN,
}
# Third-party packages that only some rooms may know.
OWNERS = {
  "flax": {"models"},
  "grain": {"data"},
  "tensorflow_datasets": {"data"},
  "pyarrow": {"data"},
  "orbax": {"train"},
  "tensorboardX": {"train"},
  "torch": {"interop"},
}
FILES = sorted(ROOT.rglob("*.py"))


def _imports(path):
  """Yields the dotted names that a file imports, wherever in the file."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: a relative import"
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(path):
  parts = path.relative_to(ROOT).parts
  return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
  room = _room(path)
  for name in _imports(path):
    package, *rest = name.split(".")
    if package == "flowjax" and rest and room in ALLOWED:
      assert rest[0] in ALLOWED[room], f"{room} imports {name}"
    if package in OWNERS:
      assert room in OWNERS[package], f"{room} imports {name}"


def test_the_rule_sees_something():
  """Guards the test itself: the rooms exist and import each other."""
  seen = {
    (_room(path), name.split(".")[1])
    for path in FILES
    for name in _imports(path)
    if name.startswith("flowjax.")
  }
  assert ("train", "flow") in seen and ("models", "ops") in seen
  assert set(ALLOWED) <= {_room(path) for path in FILES}


def test_only_one_file_builds_a_mesh():
  builders = [
    path.name
    for path in FILES
    if "make_mesh(" in path.read_text() or " Mesh(" in path.read_text()
  ]
  assert builders == ["mesh.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "module", ["flowjax.flow", "flowjax.models", "flowjax.train.step"]
)
def test_light_modules_pull_in_nothing_heavy(module):
  heavy = "tensorflow torch tensorflow_datasets clu grain orbax".split()
  code = (
    f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"
