"""The folder of a pipeline, and the scheduler that a config stands for."""

import json
import shutil

import numpy as np
import pytest

from flowjax import errors, schema
from flowjax.interop import folder_export, pipelines, weights
from flowjax.models import flux
from flowjax.train import experiment, flows, methods, presets

CONFIG = flux.FluxConfig(
  image_size=(4, 4),
  channels=4,
  width=32,
  heads=2,
  double_depth=1,
  single_depth=1,
  rope_axes=(4, 6, 6),
  text_width=12,
  pooled_width=16,
)
INDEX = {
  "_class_name": "FluxPipeline",
  "_diffusers_version": "0.36.0",
  "force_zeros_for_empty_prompt": True,
  "scheduler": ["diffusers", "SomeScheduler"],
  "text_encoder": [None, None],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "transformer": ["diffusers", "FluxTransformer2DModel"],
  "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}


@pytest.fixture(name="source")
def _source(tmp_path):
  """Returns a pipeline's folder, its files read-only behind links."""
  contents = {
    "model_index.json": INDEX,
    "scheduler/scheduler_config.json": {"_class_name": "SomeScheduler"},
    "tokenizer/vocab.json": {"a": 1},
    "transformer/config.json": {"_class_name": "FluxTransformer2DModel"},
    "transformer/other.safetensors": "not ours",
    "vae/config.json": {"latent_channels": 4},
  }
  blobs = tmp_path / "blobs"
  blobs.mkdir()
  for i, (name, content) in enumerate(contents.items()):
    (blobs / str(i)).write_text(json.dumps(content))
    (blobs / str(i)).chmod(0o444)
    path = tmp_path / "source" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(blobs / str(i))
  return tmp_path / "source"


def export(params, out, **options):
  folder_export.export(params, CONFIG, out, format="diffusers", **options)


def names(folder):
  found = (path.relative_to(folder) for path in folder.rglob("*"))
  return sorted(str(path) for path in found if (folder / path).is_file())


def test_a_pipeline_has_our_transformer_and_the_other_parts(
  source, tmp_path, draw
):
  params, out = draw(CONFIG), tmp_path / "out"
  export(params, out, pipeline=source)
  whole = [
    "flowjax.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/flowjax.json",
    "vae/config.json",
  ]
  assert names(out) == whole
  assert not any(path.is_symlink() for path in out.rglob("*"))
  assert json.loads((out / "model_index.json").read_text()) == INDEX

  found = weights.open(out)
  assert found.config() == CONFIG
  paths, leaves = found.leaves(CONFIG)
  for (path, leaf), name in zip(leaves, paths, strict=True):
    wanted = params
    for key in path.split("/"):
      wanted = wanted[key]
    np.testing.assert_array_equal(leaf, wanted, err_msg=name)

  # Again, with a scheduler of ours, from a pipeline without its transformer;
  # what is not ours stays.
  shutil.rmtree(source / "transformer")
  (out / "scheduler" / "stale").write_text("")
  (out / "notes.txt").write_text("mine")
  export(params, out, pipeline=source, scheduler=SCHEDULER)
  assert names(out) == sorted([*whole, "notes.txt"])
  index = json.loads((out / "model_index.json").read_text())
  assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
  content = (out / "scheduler" / "scheduler_config.json").read_text()
  assert json.loads(content) == SCHEDULER

  # And the transformer alone, of which none of the parts is a part.
  export(params, out, scheduler=SCHEDULER)
  assert names(out) == [
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "flowjax.json",
    "notes.txt",
    "scheduler/scheduler_config.json",
  ]


FLOW = schema.to_dict(flows.FlowConfig())


@pytest.mark.parametrize(
  "scheduler, prediction, path, fits",
  [
    (SCHEDULER, "velocity", "straight", True),
    (SCHEDULER, "data", "straight", False),
    (SCHEDULER, "velocity", "cosine", False),
    ({"prediction_type": "flow_prediction"}, "velocity", "straight", True),
    ({"prediction_type": "epsilon"}, "noise", "ddpm", True),
    ({"prediction_type": "epsilon"}, "velocity", "straight", False),
    ({"prediction_type": "epsilon"}, "noise", "straight", False),
    ({"prediction_type": "v_prediction"}, "v", "ddpm", True),
    ({"prediction_type": "v_prediction"}, "noise", "ddpm", False),
    ({}, "data", "cosine", True),  # It says nothing.
  ],
)
def test_a_scheduler_is_not_given_what_it_would_misread(
  source, scheduler, prediction, path, fits
):
  name = "scheduler/scheduler_config.json"
  _change(source, name, **{"_class_name": "SomeScheduler", **scheduler})
  flow = FLOW | {"prediction": prediction, "path": {"name": path}}
  if fits:
    pipelines.require_steps(source, flow)
  else:
    with pytest.raises(errors.UserError, match=f"'{prediction}' on the path"):
      pipelines.require_steps(source, flow)


def _change(source, name, **changes):
  content = json.loads((source / name).read_text()) | changes
  (source / name).unlink()
  (source / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
  "spoil, text",
  [
    (lambda s: (s / "model_index.json").unlink(), "save_pretrained"),
    (
      lambda s: _change(
        s,
        "model_index.json",
        transformer=["diffusers", "SD3Transformer2DModel"],
      ),
      "'SD3Transformer2DModel'.*'FluxTransformer2DModel'",
    ),
    (
      lambda s: _change(
        s, "model_index.json", transformer=None, unet=["a", "B"]
      ),
      "its transformer is None",
    ),
    (
      lambda s: _change(s, "model_index.json", extra=["diffusers", "Extra"]),
      "names 'extra', and there is no such folder",
    ),
    (
      lambda s: _change(s, "model_index.json", **{"../blobs": ["a", "B"]}),
      "names '../blobs'",
    ),
    (
      lambda s: _change(s, "vae/config.json", latent_channels=16),
      "16 channels, and the network draws 4",
    ),
  ],
)
def test_a_folder_that_does_not_fit_is_refused(
  source, tmp_path, draw, spoil, text
):
  spoil(source)
  with pytest.raises(errors.UserError, match=text):
    export(draw(CONFIG), tmp_path / "out", pipeline=source)
  assert not (tmp_path / "out").exists()


def scheduler_of(flow, sample):
  return pipelines.scheduler(schema.to_dict(flow), schema.to_dict(sample))


def with_preset(preset="flux", **sample):
  """Returns what a preset says of flow and sample, with changes."""
  config = presets.apply(experiment.defaults("flux"), preset)
  config.sample.update_from_flattened_dict(sample)
  return (
    schema.build(flows.FlowConfig, config.flow.to_dict(), "flow"),
    schema.build(methods.SampleConfig, config.sample.to_dict(), "sample"),
  )


@pytest.mark.parametrize(
  "preset, changes",
  [
    ("ddpm", {}),
    ("cfm", {"solver.name": "euler"}),  # Its path does not end in data.
    ("flux", {"solver.name": "heun"}),
    ("flux", {"path.name": "straight", "path.low": 0.01}),
    ("flux", {"grid.shift_by": "sd3"}),
    ("flux", {"grid.shift": 3.0}),
    ("flux", {"grid.base_tokens": 64}),
    ("flux", {"grid.terminal": 0.1}),
    ("rectified_flow", {"grid.name": "karras"}),
  ],
)
def test_what_no_scheduler_does_has_none(preset, changes):
  assert scheduler_of(*with_preset(preset, **changes)) is None


STEPS, TOKENS = 7, 1024
EVEN = np.linspace(1.0, 1.0 / STEPS, STEPS)


@pytest.mark.parametrize(
  "preset, grid, arguments",
  [
    # SD3's pipeline by itself; FLUX's by itself; and with sigmas that are told.
    ("sd3", {"grid.name": "flow_match", "grid.compat": True}, {}),
    ("flux", {"grid.compat": True}, {"sigmas": EVEN, "mu": 0.63}),
    ("sd3", {}, {"sigmas": EVEN}),
    ("rectified_flow", {}, {"sigmas": EVEN}),
  ],
)
def test_the_scheduler_visits_the_times_of_the_config(preset, grid, arguments):
  diffusers = pytest.importorskip("diffusers")
  flow, sample = with_preset(preset, steps=STEPS, **grid)
  content = scheduler_of(flow, sample)
  theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(content)
  for key in content.keys() - {"_class_name", "_diffusers_version"}:
    assert theirs.config[key] == content[key]
  if preset == "flux":
    mu = np.log(flows.shift_by(sample.grid, TOKENS))
    assert mu == pytest.approx(arguments["mu"], abs=1e-9)
  if "sigmas" not in arguments:
    arguments = {"num_inference_steps": STEPS}
  theirs.set_timesteps(**arguments)
  ours = sample.grid.build(flow.path.build(), STEPS, TOKENS)
  np.testing.assert_allclose(ours, theirs.sigmas.numpy(), atol=2e-7, rtol=0)
