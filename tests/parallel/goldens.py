"""What tiny models send over the wires in each mode: a table, and who fills it.

  python tests/parallel/goldens.py            compares all with the table
  python tests/parallel/goldens.py --update   writes the table anew
  python tests/parallel/goldens.py --show "cpu dit fsdp"   one, in full

Names of entries after them stand for these alone.

The programs are those that `flowjax train` compiles, for 8 virtual devices of a
CPU and, where libtpu is installed, for slices of TPUs. An entry of the table
counts the operations of a program by kind, dtype and mesh axes, "in the layers"
or "once"; a loop's body counts once. The tests compare those in IN_TESTS.
"""

import argparse
import collections
import json
import pathlib
import runpy
import sys
from importlib import metadata

ROOT = pathlib.Path(__file__).parents[2]
if __name__ == "__main__":  # The devices and the flags of the tests.
  sys.path.insert(0, str(ROOT))
  runpy.run_path(str(ROOT / "tests/conftest.py"))

import jax  # noqa: E402

from flowjax.parallel import collectives, topology  # noqa: E402
from flowjax.train import experiment, loop, parts  # noqa: E402

TABLE = pathlib.Path(__file__).with_name("goldens.json")
MESHES = {
  "data": dict(data=8),
  "fsdp": dict(data=1, fsdp=8),
  "tensor": dict(data=2, tensor=4),
  "context": dict(data=2, context=4),
  "context x ulysses": dict(data=2, context=2, ulysses=2),
  "data x fsdp": dict(data=2, fsdp=4),
  "fsdp x tensor": dict(data=1, fsdp=2, tensor=4),
  "all": dict(data=1, fsdp=2, tensor=2, context=2),
}
PLACES = {"cpu": None, "v5p": "v5p:2x2x2", "v5e": "v5e:2x4"}
MODELS = ("dit", "mmdit", "flux")
NAMES = (
  *(f"cpu {model} {mode}" for model in MODELS for mode in MESHES),
  *(f"{place} dit {mode}" for place in ("v5p", "v5e") for mode in MESHES),
  *(f"v5p {model} fsdp x tensor" for model in ("mmdit", "flux")),
)
# Of one model every axis, alone, beside others and with all: but "fsdp" alone,
# whose gathers test_sums.py counts, and "data" alone, whose sums are counted
# there with accumulate=4 and nowhere without. Of the others and of TPUs, which
# take longest to compile, those of which a mistake in the models or the rules
# leaves none as it was.
IN_TESTS = (
  "cpu dit tensor",
  "cpu dit context",
  "cpu dit context x ulysses",
  "cpu dit data x fsdp",
  "cpu dit all",
  "cpu mmdit fsdp x tensor",
  "cpu flux fsdp x tensor",
  "v5p dit fsdp x tensor",
)
_COMMON = dict(
  image_size=(8, 8),
  channels=4,
  patch_size=2,
  heads=4,
  dtype="bfloat16",
  remat="save_attention",
)
_TEXT = dict(text_width=16, pooled_width=16, text_tokens=8)
# Blocks in each stack: no other dim has this size.
LAYERS = 5
_SIZES = {
  "dit": dict(width=32, depth=LAYERS, num_classes=10),
  "mmdit": dict(
    head_size=8, depth=LAYERS + 1, position_table=8, qk_norm=True, **_TEXT
  ),
  "flux": dict(
    width=32,
    double_depth=LAYERS,
    single_depth=LAYERS,
    rope_axes=(2, 2, 4),
    **_TEXT,
  ),
}


def built(name: str) -> parts.Parts:
  """Returns the parts of the run that a name of the table stands for."""
  place, model, mode = name.split(" ", 2)
  config = experiment.defaults(model)
  config.model.update(**_COMMON, **_SIZES[model])
  config.data.update(
    source="folder:/none", image_size=(8, 8), channels=4, batch_size=16
  )
  config.optim.clip_norm = 1.0
  config.mesh.update(**MESHES[mode])
  where = PLACES[place]
  devices = jax.devices()[:8]
  if where is not None:
    devices = topology.devices(topology.parse(where))
  return parts.build(experiment.build(config), devices)


def is_possible(name: str) -> bool:
  """Tells whether what compiles for it is installed."""
  where = PLACES[name.split()[0]]
  return where is None or topology.is_installed(topology.parse(where))


def compilers(name: str) -> dict[str, str]:
  """Returns the versions by which what is sent for a name was decided."""
  packages = ("jax",) if PLACES[name.split()[0]] is None else ("jax", "libtpu")
  return {package: metadata.version(package) for package in packages}


def moved(run: parts.Parts) -> list[collectives.Collective]:
  """Compiles the step of a run and returns what it sends."""
  text = loop.lower_step(run).compile().as_text()
  return collectives.read(text, run.mesh)


def entry(found: list[collectives.Collective]) -> dict[str, dict[str, int]]:
  """Returns what the table says of these."""
  counts: dict[str, collections.Counter] = {
    "in the layers": collections.Counter(),
    "once": collections.Counter(),
  }
  for one in found:
    row = f"{one.kind} {one.dtype} over {' x '.join(one.axes)}"
    counts["in the layers" if one.trips else "once"][row] += 1
  return {place: dict(sorted(rows.items())) for place, rows in counts.items()}


def differences(name: str, found: dict, table: dict) -> list[str]:
  """Returns what is other than the table says, a line each."""
  rows = []
  for place in ("in the layers", "once"):
    old, new = table[name][place], found[place]
    for row in sorted(set(old) | set(new)):
      if old.get(row, 0) != new.get(row, 0):
        rows.append(f"{place}: {row}: {old.get(row, 0)} -> {new.get(row, 0)}")
  return rows


def read() -> dict:
  """Returns the table."""
  return json.loads(TABLE.read_text())


def main() -> int:
  """Compares, shows or updates."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--update", action="store_true")
  parser.add_argument("--show", action="store_true")
  parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
  flags = parser.parse_args()
  topology.prepare()
  table, wrong = read() if TABLE.exists() else {}, 0
  for name in filter(is_possible, flags.names):
    sent = moved(built(name))
    found = entry(sent)
    if flags.show:
      print("\n  ".join([name, *map(str, sent)]))
      continue
    if flags.update:
      table[name] = found
      table.update(compilers(name))
      TABLE.write_text(json.dumps(table, indent=1) + "\n")
      print(f"{name}: written", flush=True)
      continue
    rows = differences(name, found, table)
    wrong += bool(rows)
    print("\n  ".join([f"{name}: {'differs' if rows else 'same'}", *rows]))
  return int(wrong > 0)


if __name__ == "__main__":
  sys.exit(main())
