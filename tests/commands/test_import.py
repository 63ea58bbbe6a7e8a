"""Weights come in by a command, train on, and go out again the same."""

import dataclasses
import functools
import json
import pathlib
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy

from flowjax import __main__ as door
from flowjax import models
from flowjax.interop import folder_export, torch_export
from flowjax.interop import mmdit as layouts
from flowjax.models import dit, flux, mmdit
from flowjax.train import checkpoint

pytestmark = pytest.mark.usefixtures(
  "on_one_device", "traced_once", "hashed_by_numpy"
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# The network of a file is that of --config.
CONFIG = [
  f"--config={CONFIGS}/digits_dit.py",
  "--config.model.position=sincos2d",
  "--config.model.patch_size=4",
  "--config.model.width=16",
  "--config.model.depth=2",
  "--config.model.heads=2",
  "--config.model.num_classes=3",
]
IMAGES = dict(image_size=(8, 8), channels=1)
DIT = dit.DiTConfig(
  **IMAGES,
  patch_size=4,
  width=16,
  depth=2,
  heads=2,
  num_classes=3,
  position="sincos2d",
)
TEXT = dict(
  **IMAGES, heads=2, text_width=8, pooled_width=6, text_tokens=3, label_tokens=3
)
FLUX = dict(width=16, double_depth=1, single_depth=2, rope_axes=(2, 2, 4))
NETWORKS = {
  "dit": DIT,
  "flux": flux.FluxConfig(**TEXT, **FLUX, num_classes=2),
  "mmdit": mmdit.MMDiTConfig(
    **TEXT, depth=2, head_size=8, position_table=16, num_classes=2
  ),
}


def config_for(format, network="dit"):
  shift = dict(frequency_shift=1.0) if format == "diffusers" else {}
  config = NETWORKS[network]
  return dataclasses.replace(config, **shift if network == "dit" else {})


@functools.lru_cache
def draw(config):
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(models.build(config).init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract
  )


def write(folder, format, network="dit", **options):
  config = config_for(format, network)
  if format == "torch":
    torch_export.export(draw(config), config, folder, **options)
  else:
    folder_export.export(draw(config), config, folder, format=format, **options)
  return folder


def flowjax(*words):
  return door.main([str(word) for word in words])


def same_files(folder, other):
  names = {path.name for path in folder.iterdir()} - {"README.md"}
  assert names == {path.name for path in other.iterdir()} - {"README.md"}
  for name in names - {folder_export.MARKER}:
    assert (folder / name).read_bytes() == (other / name).read_bytes(), name
  assert any(name.endswith(".safetensors") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
  "format, network, dtype, shard",
  [
    ("diffusers", "dit", "float32", None),
    ("diffusers", "dit", "bfloat16", 10_000),
    ("original", "dit", "float16", 10_000),
    ("torch", "dit", "float32", None),
    ("diffusers", "flux", "bfloat16", None),
    ("torch", "mmdit", "float32", None),
  ],
)
def test_what_is_imported_is_exported_the_same(
  tmp_path, format, network, dtype, shard
):
  sharded = dict(max_bytes=shard) if shard else {}
  folder = write(tmp_path / "a", format, network, dtype=dtype, **sharded)
  workdir, again = tmp_path / "run", tmp_path / "b"
  assert flowjax("import", f"--from={folder}", f"--workdir={workdir}") == 0
  words = [f"--max-shard-size={shard / 1000}KB"] if shard else []
  words += [f"--format={format}", f"--dtype={dtype}", f"--workdir={workdir}"]
  assert flowjax("export", *words, f"--out={again}") == 0
  same_files(folder, again)
  if network == "dit":
    saved = json.loads((workdir / "config.json").read_text())
    shift = 1.0 if format == "diffusers" else 0.0
    assert saved["model"]["frequency_shift"] == shift


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_fresh_sd3_of_diffusers_needs_no_flag(tmp_path, dtype):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  config = dataclasses.replace(NETWORKS["mmdit"], num_classes=0)
  fresh = diffusers.SD3Transformer2DModel(**layouts.diffusers_config(config))
  fresh.to(getattr(torch, dtype)).save_pretrained(tmp_path / "a")
  workdir = tmp_path / "run"
  assert flowjax("import", f"--from={tmp_path}/a", f"--workdir={workdir}") == 0
  saved = json.loads((workdir / "config.json").read_text())["model"]
  # Its grid is that of its own images, 4 x 4 patches in a table of 16 x 16.
  assert (saved["position_scale"], saved["position_offset"]) == (0.25, 0.0)
  words = [f"--workdir={workdir}", "--format=diffusers", f"--dtype={dtype}"]
  assert flowjax("export", *words, f"--out={tmp_path}/b") == 0
  a, b = (safetensors.numpy.load_file(tmp_path / x / WHOLE) for x in "ab")
  assert a.keys() == b.keys()
  grid = layouts.POSITIONS_IN_DIFFUSERS
  for key in a:
    atol = np.finfo(dtype).eps if key == grid else 0.0
    np.testing.assert_allclose(b[key], a[key], rtol=0, atol=atol, err_msg=key)


@pytest.mark.slow
def test_an_imported_run_samples_and_trains_on(tmp_path, capsys):
  config = dataclasses.replace(config_for("diffusers"), num_classes=10)
  folder, workdir = tmp_path / "pipeline" / "transformer", tmp_path / "run"
  folder_export.export(draw(config), config, folder, format="diffusers")
  (folder / folder_export.MARKER).unlink()  # As `save_pretrained` leaves it.
  (tmp_path / "pipeline" / "model_index.json").write_text("{}")
  words = [
    "--config.steps=2",
    "--config.data.batch_size=64",
    "--config.sample.steps=2",
    "--config.log.validation_every=0",
    "--config.log.samples_every=0",
    "--config.log.tensorboard=False",
  ]
  given = [f"--from={tmp_path}/pipeline", f"--workdir={workdir}", *words]
  assert flowjax("import", *given) == 0
  out = capsys.readouterr().out
  assert "44 tensors" in out
  assert out.endswith(" --config.data.source=SOURCE --allow_config_change\n")
  assert flowjax("import", *given) == 2
  assert "is that of a run already, at step 0" in capsys.readouterr().err
  away = workdir / "checkpoints" / "0"
  away.rename(tmp_path / "0")  # It is all the same, where that is gone.
  assert flowjax("import", *given) == 2
  assert "is that of a run already, at step 0" in capsys.readouterr().err
  (tmp_path / "0").rename(away)

  out = tmp_path / "grid.png"
  assert flowjax("sample", f"--workdir={workdir}", f"--out={out}") == 0
  saved = f"--config={workdir}/config.json"
  changed = "--config.model.heads=4"
  assert flowjax("train", saved, f"--workdir={workdir}", changed) == 2
  assert "model.heads: 2 -> 4" in capsys.readouterr().err
  assert flowjax("train", saved, f"--workdir={workdir}") == 0
  rows = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
  assert rows[-1]["step"] == 2

  out, name = tmp_path / "b", "diffusion_pytorch_model.safetensors"
  words = ["--no-ema", "--format=diffusers", f"--workdir={workdir}"]
  assert flowjax("export", *words, f"--out={out}") == 0
  a, b = (safetensors.numpy.load_file(path / name) for path in (folder, out))
  assert 0 < max(np.abs(a[key] - b[key]).max() for key in a) < 0.01


def original(tmp_path):
  folder = write(tmp_path / "original", "original", dtype="float32")
  return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_of_a_file_with_other_parts_the_transformer_is_read(tmp_path, capsys):
  tensors = {
    f"model.diffusion_model.{k}": v for k, v in original(tmp_path).items()
  }
  tensors["first_stage_model.decoder.conv.weight"] = np.ones((2, 2), np.float32)
  tensors["model_ema.num_updates"] = np.array(3)
  file = tmp_path / "all.safetensors"
  safetensors.numpy.save_file(tensors, file)
  given = ["import", f"--from={file}", f"--workdir={tmp_path}/run"]
  assert flowjax(*given) == 2
  assert "name a --config" in capsys.readouterr().err
  assert flowjax(*given, *CONFIG) == 0
  out = capsys.readouterr().out
  assert "Left" in out and "first_stage_model (1)" in out
  assert "model_ema (1)" in out
  assert (
    flowjax(
      "export",
      "--format=original",
      f"--workdir={tmp_path}/run",
      f"--out={tmp_path}/b",
    )
    == 0
  )
  same_files(tmp_path / "original", tmp_path / "b")


NAME = "diffusion_pytorch_model"


def _edit_json(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def _edit_header(path, change):
  content = path.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  header = json.loads(content[8 : 8 + length])
  change(header)
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _edit_tensors(path, change):
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def _pickle(folder):
  for path in folder.glob("*.safetensors*"):
    path.unlink()
  (folder / f"{NAME}.bin").write_bytes(b"PK\x03\x04")


def _overlap(header):
  keys = [key for key in header if header[key].get("shape") == [16]]
  header[keys[1]]["data_offsets"] = header[keys[0]]["data_offsets"]


def _lie(header):
  header["proj_out_2.bias"]["shape"] = [99]


def _rename_in_index(content):
  places = content["weight_map"]
  places["proj_out_9.bias"] = places.pop("proj_out_2.bias")


def _config(**changes):
  """Changes a config.json, from which our own marker is then taken."""

  def change(folder):
    (folder / folder_export.MARKER).unlink()
    _edit_json(folder / "config.json", lambda content: content.update(changes))

  return change


INDEX = f"{NAME}.safetensors.index.json"
WHOLE, SHARDS = f"{NAME}.safetensors", dict(max_bytes=40_000)
BIAS = "proj_out_2.bias"
# What is done to a sound folder, what of it is then said, and the exit code.
DAMAGES = {
  "a pickle": (_pickle, {}, ["run", "convert", f"{NAME}.bin"], 2),
  "a missing shard": (
    lambda f: next(f.glob("*-00001-of-*")).unlink(),
    SHARDS,
    ["-00001-of-", "missing"],
    4,
  ),
  "a key that is not there": (
    lambda f: _edit_json(f / INDEX, _rename_in_index),
    SHARDS,
    [BIAS, "index"],
    4,
  ),
  "a file outside": (
    lambda f: _edit_json(
      f / INDEX, lambda c: c["weight_map"].update({BIAS: "../x.safetensors"})
    ),
    SHARDS,
    ["../x.safetensors", "beside"],
    4,
  ),
  "a lie about a size": (
    lambda f: _edit_header(f / WHOLE, _lie), {}, [BIAS, "396 bytes"], 4,
  ),
  "an overlap": (
    lambda f: _edit_header(f / WHOLE, _overlap), {}, ["overlap", "bias"], 4,
  ),
  "no data_offsets": (
    lambda f: _edit_header(f / WHOLE, lambda h: h[BIAS].pop("data_offsets")),
    {},
    [BIAS, "data_offsets"],
    4,
  ),
  "another class": (
    lambda f: _edit_json(
      f / "config.json", lambda c: c.update(_class_name="UNet2DModel")
    ),
    {},
    ["UNet2DModel", "config.json"],
    2,
  ),
  "an unmapped key": (
    lambda f: _edit_tensors(
      f / WHOLE, lambda t: t.update(stray=np.ones(3, np.float32))
    ),
    {},
    ["unmapped", "stray [3]"],
    4,
  ),
  "a missing key": (
    lambda f: _edit_tensors(f / WHOLE, lambda t: t.pop(BIAS)),
    {},
    ["missing", BIAS],
    4,
  ),
  "a wrong shape": (
    lambda f: _edit_tensors(f / WHOLE, lambda t: t.update({BIAS: t[BIAS][:3]})),
    {},
    ["mis-shaped", f"{BIAS} [3], should be [16]"],
    4,
  ),
  "a wrong dtype": (
    lambda f: _edit_tensors(
      f / WHOLE, lambda t: t.update({BIAS: t[BIAS].astype(np.int64)})
    ),
    {},
    [BIAS, "I64"],
    4,
  ),
  "no number in a config": (
    _config(num_layers="2"),
    {},
    ["config.json: num_layers = '2' must be a whole number"],
    2,
  ),
  "a null in a config": (
    _config(attention_head_dim=None), {}, ["attention_head_dim = None"], 2,
  ),
  "more layers than could be": (
    _config(num_layers=10**9), {}, ["44 tensors, and depth=1000000000"], 4,
  ),
  "a marker without a network": (
    lambda f: _edit_json(f / "flowjax.json", lambda c: c.pop("model")),
    {},
    ["flowjax.json is damaged: model = None"],
    4,
  ),
  "a marker with a word for a number": (
    lambda f: _edit_json(
      f / "flowjax.json", lambda c: c.update(sample={"steps": "many"})
    ),
    {},
    ["sample.steps = 'many' is of the wrong type"],
    4,
  ),
  "a lost index": (
    lambda f: (f / INDEX).unlink(), SHARDS, ["without their index"], 2,
  ),
  "an empty file": (
    lambda f: (f / WHOLE).write_bytes(b""), {}, ["ends after 0 bytes"], 4,
  ),
  "a folder for a file": (
    lambda f: ((f / WHOLE).unlink(), (f / WHOLE).mkdir()),
    {},
    [WHOLE, "cannot be read"],
    4,
  ),
  "embedders trained apart": (
    lambda f: _edit_tensors(
      f / WHOLE,
      lambda t: t.update(
        {k: t[k] + 1 for k in t if "blocks.1.norm1.emb.class" in k}
      ),
    ),
    {},
    ["transformer_blocks.1.norm1.emb.class_embedder"],
    4,
  ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_nothing_is_imported(
  tmp_path, capsys, damage
):
  change, options, texts, code = DAMAGES[damage]
  folder = write(tmp_path / "a", "diffusers", **options)
  change(folder)
  workdir = tmp_path / "run"
  assert flowjax("import", f"--from={folder}", f"--workdir={workdir}") == code
  said = capsys.readouterr().err
  for text in texts:
    assert text in said, said
  assert not workdir.exists()


@pytest.mark.parametrize("name", ["dit.pt", "dit.ckpt", "dit.safetensors"])
def test_a_file_that_is_a_pickle_is_refused(tmp_path, capsys, name):
  (tmp_path / name).write_bytes(b"PK\x03\x04 and so on")
  words = [f"--from={tmp_path / name}", f"--workdir={tmp_path}/run", *CONFIG]
  assert flowjax("import", *words) == 2
  assert "weights_only=True" in capsys.readouterr().err


@pytest.mark.parametrize(
  "words, text",
  [
    (["--from=/nowhere"], "no such file"),
    (["--from=some-lab/some-model"], "Nothing is fetched"),
    (["--from={}", f"--workdir={__file__}"], "is a file; name a folder"),
    (["--from={}", f"--config={CONFIGS}/digits_nf.py"], "'coupling'"),
    (["--from={}", "--config.model.width=32"], "mis-shaped"),
    (["--from={}", "--config.model.widht=32"], "'width'"),
  ],
)
def test_a_mistake_names_the_remedy(tmp_path, capsys, words, text):
  folder = write(tmp_path / "a", "diffusers")
  words = [f"--workdir={tmp_path}/run", *(w.format(folder) for w in words)]
  assert flowjax("import", *words) in (2, 4)
  assert text in capsys.readouterr().err


def test_a_config_says_more_than_its_class_knows(tmp_path, caplog):
  folder = write(tmp_path / "a", "diffusers")
  _config(cross_attention_dim=None, attention_type="gated")(folder)
  assert flowjax("import", f"--from={folder}", f"--workdir={tmp_path}/run") == 0
  assert "attention_type, of which DiTTransformer2DModel" in caplog.text
  assert "cross_attention_dim" not in caplog.text


def test_an_export_that_lost_its_labels_is_refused(tmp_path, capsys):
  folder = write(tmp_path / "a", "diffusers", "flux")
  (folder / "label_embeddings.safetensors").unlink()
  assert flowjax("import", f"--from={folder}", f"--workdir={tmp_path}/run") == 4
  assert "label_embeddings.safetensors, which is missing" in (
    capsys.readouterr().err
  )


def test_what_ends_before_all_is_saved_leaves_no_run(tmp_path, monkeypatch):
  """Of which `train` would draw the weights that were not imported."""
  folder, workdir = write(tmp_path / "a", "diffusers"), tmp_path / "run"
  given = ["import", f"--from={folder}", f"--workdir={workdir}"]

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
      flowjax(*given)
  assert not (workdir / "config.json").exists()
  assert flowjax(*given) == 0
  assert (workdir / "config.json").exists()


def test_weights_that_are_not_finite_are_told(tmp_path, caplog):
  folder = write(tmp_path / "a", "diffusers")

  def spoil(tensors):
    tensors[BIAS][3] = np.nan

  _edit_tensors(folder / WHOLE, spoil)
  assert flowjax("import", f"--from={folder}", f"--workdir={tmp_path}/run") == 0
  assert "final/out/bias is not finite" in caplog.text
