"""Projects how training scales, from 8 to 4,096 devices: a model, not a run.

  python benchmarks/scaling.py            projects; half a minute on one core
  python benchmarks/scaling.py --anchors  also compiles a few, to compare with;
                                          --anchors 0 2: of them the named

Writes benchmarks/results/scaling.json, docs/scaling.png, and the tables in
docs/scaling.md. The mathematics is flowjax/parallel/roofline.py's; each device
has the same number of images at every size, and the mesh is the fastest that
fits by the model.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from flowjax.parallel import roofline, topology  # noqa: E402

topology.prepare()

from flowjax.commands import configs  # noqa: E402
from flowjax.train import plan, search  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scaling.json"
PAGE, PLOT = ROOT / "docs/scaling.md", ROOT / "docs/scaling.png"
MODELS = {
  "DiT-XL/2, 256 px": "imagenet_dit.py:xl_2",
  "SD3.5-large, 1024 px": "sd3.py:3.5_large",
  "FLUX.1-dev, 1024 px": "flux_dev.py",
}
# Images on each device, of each model: what fits a device of its kind.
IMAGES = {"v5p": (64, 4, 4), "v6e": (32, 2, 1), "h100": (64, 2, 2)}
# And one image, which leaves least to hide the wires behind.
FEWEST = {("SD3.5-large, 1024 px", "v6e")}
TPU_3D = (
  "2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16".split()
)
TPU_2D = "2x4 4x4 4x8 8x8 8x16 16x16".split()
CLUSTERS = {
  "v5p": [topology.parse(f"v5p:{sides}") for sides in TPU_3D],
  "v6e": [
    *(topology.parse(f"v6e:{sides}") for sides in TPU_2D),
    *(topology.parse("v6e:16x16", slices) for slices in (2, 4, 8, 16)),
  ],
  "h100": [topology.parse(f"h100:{2**k}x8") for k in range(8)],
}
REMATS = ("none", "save_attention", "full")
TABLE_SIZES = (8, 64, 256, 1024, 4096)
# What is compiled, to see how far the model is from a compiler.
ANCHORS = (
  ("imagenet_dit.py:xl_2", "v5e:16x16", "none", dict(data=32, fsdp=8), 8192),
  ("imagenet_dit.py:xl_2", "v5p:4x4x4", "full", dict(data=4, fsdp=16), 4096),
  ("imagenet_dit.py:xl_2", "h100:8x8", "full", dict(data=8, fsdp=8), 1024),
  ("flux_dev.py", "v5p:8x8x8", "save_attention", dict(data=8, fsdp=64), 1024),
)


def config_of(file: str, remat: str, batch: int, mesh: dict[str, int]):
  """Returns an experiment with these changes."""
  words = [
    f"--config.model.remat={remat}",
    f"--config.data.batch_size={batch}",
    *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
  ]
  return configs.load(str(ROOT / "configs" / file), words)


def project(file: str, where: topology.Topology, images: int):
  """Returns the fastest plan that fits, or None."""
  best = None
  for remat in REMATS:
    start = config_of(file, remat, images * where.size, {})
    for shape in search.shapes(start, where):
      ways = shape["data"] * shape["fsdp"]
      if shape["context"] > 1 or shape["tensor"] > 4:
        continue
      if images * where.size % ways:
        continue
      mesh = dataclasses.replace(start.mesh, **shape)
      config = dataclasses.replace(start, mesh=mesh)
      one = plan.modelled(config, where)
      if one.fits and (best is None or one.step.seconds < best.step.seconds):
        best = one
  return best


def row_of(model: str, chip: str, where, images: int, found) -> dict:
  """Returns a row of the results."""
  row = {
    "model": model,
    "chip": chip,
    "topology": where.name,
    "slices": where.slices,
    "devices": where.size,
    "images_per_device": images,
    "fits": found is not None,
  }
  if found is None:
    return row
  step = found.step
  return row | {
    "mesh": found.shape,
    "remat": found.remat,
    "bytes_per_device": found.bytes_per_device,
    "step_seconds": step.seconds,
    "exposed_communication_seconds": step.exposed,
    "communication_seconds": step.wires,
    "mfu": found.mfu,
    "images_per_second": found.batch_size / step.seconds,
    "bound_by": step.bound_by,
  }


def projections() -> list[dict]:
  """Returns all rows; the efficiency is that of a device at the first size."""
  rows = []
  for number, (model, file) in enumerate(MODELS.items()):
    for chip, clusters in CLUSTERS.items():
      each = (IMAGES[chip][number],) + (1,) * ((model, chip) in FEWEST)
      for images in each:
        first = None
        for where in clusters:
          row = row_of(model, chip, where, images, project(file, where, images))
          if row["fits"]:
            rate = row["images_per_second"] / where.size
            first = first or rate
            row["weak_scaling_efficiency"] = rate / first
          rows.append(row)
      print(f"{model} on {chip}: done", flush=True)
  return rows


def anchors(known: dict, numbers: list[int]) -> dict:
  """Compiles some of ANCHORS, and adds what the model says of the same."""
  rows = dict(known)
  for number in numbers:
    file, name, remat, mesh, batch = ANCHORS[number]
    where = topology.parse(name)
    if not topology.is_installed(where):
      print(f"{name} is left out: flowjax[{where.extra}] is not installed.")
      continue
    config = config_of(file, remat, batch, mesh)
    found, _ = plan.compiled(config, where)
    rows[f"{file} {name}"] = beside(number, found)
    print(rows[f"{file} {name}"], flush=True)
  return rows


def beside(number: int, found: plan.Plan) -> dict:
  """Returns a row of what was compiled and what the model says."""
  file, name, remat, mesh, batch = ANCHORS[number]
  config, where = config_of(file, remat, batch, mesh), found.topology
  if where.is_gpu:  # Compiled without cuDNN: the same is modelled.
    xla = dataclasses.replace(config.model, attention="xla")
    config = dataclasses.replace(config, model=xla)
  guess = plan.modelled(config, where)
  return {
    "config": file,
    "topology": name,
    "mesh": mesh,
    "remat": remat,
    "batch_size": batch,
    "compiled_bytes": found.bytes_per_device,
    "modelled_bytes": guess.bytes_per_device,
    "compiled_communication_seconds": found.step.wires,
    "modelled_communication_seconds": guess.step.wires,
  }


def tables(results: dict) -> str:
  """Returns the tables of the page."""
  lines = []
  for model in MODELS:
    lines += [
      f"\n### {model}\n",
      "| devices | chip | images each | mesh (data x fsdp x tensor) | remat "
      "| step | exposed | MFU | efficiency |",
      "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["projections"]:
      if row["model"] != model or row["devices"] not in TABLE_SIZES:
        continue
      head = (
        f"| {row['devices']:,} | {row['chip']} | {row['images_per_device']} "
      )
      if not row["fits"]:
        lines.append(head + "| does not fit | | | | | |")
        continue
      mesh = " x ".join(
        str(row["mesh"][axis]) for axis in ("data", "fsdp", "tensor")
      )
      exposed = row["exposed_communication_seconds"] / row["step_seconds"]
      lines.append(
        head + f"| {mesh} | {row['remat']} | {row['step_seconds']:.3f} s "
        f"| {100 * exposed:.1f}% | {100 * row['mfu']:.1f}% "
        f"| {100 * row['weak_scaling_efficiency']:.1f}% |"
      )
  lines += ["\n### The model beside a compiler\n"]
  lines += [
    "| config | topology | mesh | remat | batch | memory: compiled, modelled "
    "| wires: compiled, modelled |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in results["anchors"].values():
    held = [row[f"{how}_bytes"] / 2**30 for how in ("compiled", "modelled")]
    sent = [
      1000 * row[f"{how}_communication_seconds"]
      for how in ("compiled", "modelled")
    ]
    mesh = ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    lines.append(
      f"| {row['config']} | {row['topology']} | {mesh} | {row['remat']} "
      f"| {row['batch_size']:,} "
      f"| {held[0]:.1f}, {held[1]:.1f} GiB ({_percent(*held)}) "
      f"| {sent[0]:.0f}, {sent[1]:.0f} ms ({_percent(*sent)}) |"
    )
  return "\n".join(lines) + "\n"


def _percent(compiled: float, modelled: float) -> str:
  return f"{100 * (modelled / compiled - 1):+.0f}%"


def draw(results: dict) -> None:
  """Draws MFU by the number of devices, a panel for each model."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, panels = pyplot.subplots(1, len(MODELS), figsize=(11, 3.6))
  for number, (panel, model) in enumerate(zip(panels, MODELS, strict=True)):
    for chip in CLUSTERS:
      wanted = (model, chip, IMAGES[chip][number])
      points = [
        (row["devices"], 100 * row["mfu"])
        for row in results["projections"]
        if (row["model"], row["chip"], row["images_per_device"]) == wanted
        and row["fits"]
      ]
      if points:
        panel.plot(*zip(*points, strict=True), marker="o", ms=4, label=chip)
    panel.set(title=model, xscale="log", ylim=(0, 70), xlabel="devices")
    panel.set_xticks([8, 64, 512, 4096], ["8", "64", "512", "4096"])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("MFU in %, modelled")
  panels[0].legend(loc="lower left")
  figure.tight_layout()
  figure.savefig(PLOT, dpi=110)


def write_page(results: dict) -> None:
  """Puts the tables where the page has them."""
  begin, end = "<!-- tables -->", "<!-- end of tables -->"
  head, rest = PAGE.read_text().split(begin)
  tail = rest.split(end)[1]
  PAGE.write_text(f"{head}{begin}\n{tables(results)}\n{end}{tail}")


def main() -> None:
  """Projects, draws and writes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--anchors", type=int, nargs="*")
  flags = parser.parse_args()
  before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  results = {
    "source": "modelled: nothing here was run",
    "assumptions": {
      name.lower(): getattr(roofline, name)
      for name in (
        "LINK_EFFICIENCY",
        "HBM_EFFICIENCY",
        "OVERLAP",
        "HOP",
        "NETWORK_HOP",
        "ELEMENTWISE",
        "REMADE",
        "OPTIMIZER",
      )
    },
    "chips": {
      chip: dataclasses.asdict(clusters[0].chip)
      for chip, clusters in CLUSTERS.items()
    },
    "projections": projections(),
    "anchors": before.get("anchors", {}),
  }
  if flags.anchors is not None:
    numbers = flags.anchors or list(range(len(ANCHORS)))
    results["anchors"] = anchors(results["anchors"], numbers)
  RESULTS.write_text(json.dumps(results, indent=1) + "\n")
  draw(results)
  write_page(results)
  print(f"written: {RESULTS}, {PLOT}, {PAGE}")


if __name__ == "__main__":
  main()
