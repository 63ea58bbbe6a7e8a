"""A pipeline of diffusers on our export draws what `flowjax sample` draws."""

# Shape suffixes: B batch, H height, W width, C channels, T image tokens, P one
# packed patch, L text tokens.

import dataclasses
import typing

import einops
import jax
import numpy as np
import pytest

from flowjax import __main__ as door
from flowjax import schema
from flowjax.commands import configs, drawing
from flowjax.interop import diffusers_configs, folder_export
from flowjax.models import flux, mmdit
from flowjax.train import experiment, parts

pytestmark = pytest.mark.usefixtures(
  "on_one_device", "traced_once", "hashed_by_numpy"
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TEXT = dict(text_width=12, pooled_width=16)
SD3 = mmdit.MMDiTConfig(
  image_size=(4, 8),
  channels=4,
  depth=2,
  heads=2,
  head_size=16,
  position_table=8,
  **TEXT,
)
FLUX = flux.FluxConfig(
  image_size=(4, 8),
  channels=4,
  width=32,
  heads=2,
  double_depth=1,
  single_depth=1,
  rope_axes=(4, 6, 6),
  **TEXT,
)
BATCH, STEPS, LENGTH, SCALE = 2, 5, 5, 3.5


@dataclasses.dataclass(frozen=True)
class Case:
  """A network, the pipeline and scheduler of it, and our method's flags."""

  model: typing.Any
  pipeline: str
  scheduler: dict
  flags: tuple[str, ...]


EULER = f"--config.sample.steps={STEPS}", "--config.sample.solver.name=euler"
GUIDED = (
  "--config.sample.guidance.name=cfg",
  f"--config.sample.guidance.scale={SCALE}",
)
TOLD = "--config.sample.guidance.name=distilled", GUIDED[1]
GRID = (
  "--config.sample.grid.name=flow_match",
  "--config.sample.grid.compat=True",
)
CASES = {
  "sd3": Case(
    SD3,
    "StableDiffusion3Pipeline",
    dict(shift=3.0),
    (*EULER, *GUIDED, *GRID, "--config.sample.grid.shift=3.0"),
  ),
  "flux_dev": Case(
    FLUX,
    "FluxPipeline",
    dict(shift=3.0, use_dynamic_shifting=True),
    (
      *(*EULER, *TOLD, *GRID, "--config.sample.grid.source=even"),
      "--config.sample.grid.shift_by=flux",
    ),
  ),
  "flux_schnell": Case(
    dataclasses.replace(FLUX, guidance_embed=False),
    "FluxPipeline",
    dict(shift=1.0),
    (*EULER, "--config.sample.grid.name=uniform"),
  ),
}


def clip():
  config = transformers.CLIPTextConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    projection_dim=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=8,
    bos_token_id=0,
    eos_token_id=1,
  )
  return transformers.CLIPTextModelWithProjection(config)


def t5():
  config = transformers.T5Config(
    vocab_size=10, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=1
  )
  return transformers.T5EncoderModel(config)


def build_pipeline(case, **scheduler):
  """Returns a tiny pipeline with fresh weights, and no tokenizers."""
  vae = diffusers.AutoencoderKL(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=1,
    latent_channels=4,
  )
  content = diffusers_configs.write(case.model)
  parts = dict(
    transformer=getattr(diffusers, content["_class_name"]).from_config(content),
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
      **{**case.scheduler, **scheduler}
    ),
    vae=vae,
    text_encoder=clip(),
    text_encoder_2=t5(),
  )
  if case.pipeline == "StableDiffusion3Pipeline":
    parts |= dict(text_encoder_2=clip(), text_encoder_3=t5())
  return getattr(diffusers, case.pipeline)(**parts, **no_tokenizers(case))


def no_tokenizers(case):
  """Returns arguments that say so: texts are given embedded."""
  count = 3 if case.pipeline == "StableDiffusion3Pipeline" else 2
  suffixes = ("", "_2", "_3")[:count]
  return {f"tokenizer{suffix}": None for suffix in suffixes}


def draw_texts(rng, negative=False):
  def normal(*shape):
    return rng.standard_normal((BATCH, *shape), np.float32)

  texts = {"text": normal(LENGTH, 12), "pooled": normal(16)}
  if negative:
    texts |= {f"negative_{k}": normal(*texts[k].shape[1:]) for k in list(texts)}
  return texts


def run_theirs(folder, case, texts, start_BHWC):
  """Returns the latents [B, H, W, C] of the pipeline in a folder."""
  kind = getattr(diffusers, case.pipeline)
  pipeline = kind.from_pretrained(folder, **no_tokenizers(case))
  pipeline.set_progress_bar_config(disable=True)
  height, width = case.model.image_size
  image, theirs = "B H W C", "B C H W"
  sides = {}
  if case.pipeline == "FluxPipeline":
    image, theirs = "B (h p) (w q) C", "B (h w) (C p q)"
    sides = dict(p=2, q=2, h=height // 2)
  embeds = {
    key.replace("text", "prompt_embeds").replace(
      "pooled", "pooled_prompt_embeds"
    ): torch.from_numpy(value)
    for key, value in texts.items()
  }
  found = pipeline(
    height=height * pipeline.vae_scale_factor,
    width=width * pipeline.vae_scale_factor,
    num_inference_steps=STEPS,
    guidance_scale=SCALE,
    latents=torch.from_numpy(
      einops.rearrange(start_BHWC, f"{image} -> {theirs}", **sides)
    ),
    output_type="latent",
    **embeds,
  ).images.numpy()
  return einops.rearrange(found, f"{theirs} -> {image}", **sides)


@pytest.fixture(name="params")
def _params(draw):
  """Returns a function that draws weights with which latents stay near 1."""

  def params(case):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: 1.3 * x + (path[-1].key == "scale"), draw(case.model)
    )

  return params


def assert_same(ours_BHWC, theirs_BHWC, start_BHWC):
  assert np.std(theirs_BHWC - start_BHWC) > 0.3
  np.testing.assert_allclose(ours_BHWC, theirs_BHWC, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_sd3_by_commands(tmp_path, params):
  case = CASES["sd3"]
  rng = np.random.default_rng(0)
  texts = draw_texts(rng, negative=True)
  start_BHWC = rng.standard_normal((BATCH, 4, 8, 4), np.float32)
  np.savez(tmp_path / "texts.npz", **texts)
  np.save(tmp_path / "start.npy", start_BHWC)
  weights, run = tmp_path / "weights", tmp_path / "run"
  folder_export.export(params(case), case.model, weights, format="diffusers")
  # Another shift: the exported one is that of the run.
  build_pipeline(case, shift=1.0).save_pretrained(tmp_path / "source")

  flowjax("import", f"--from={weights}", f"--workdir={run}", *case.flags)
  flowjax(
    *("sample", f"--workdir={run}", f"--out={tmp_path}/latents.npy"),
    *(f"--embeddings={tmp_path}/texts.npz", f"--start={tmp_path}/start.npy"),
  )
  flowjax(
    *("export", "--format=diffusers", f"--workdir={run}", "--verify"),
    *(f"--pipeline={tmp_path}/source", f"--out={tmp_path}/pipeline"),
  )
  assert_same(
    np.load(tmp_path / "latents.npy"),
    run_theirs(tmp_path / "pipeline", case, texts, start_BHWC),
    start_BHWC,
  )


def flowjax(*words):
  assert door.main([str(word) for word in words]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell"])
def test_flux_by_the_library(name, tmp_path, params):
  case = CASES[name]
  rng = np.random.default_rng(0)
  texts, weights = draw_texts(rng), params(case)
  start_BHWC = rng.standard_normal((BATCH, 4, 8, 4), np.float32)
  build_pipeline(case).save_pretrained(tmp_path / "source")
  folder_export.export(
    *(weights, case.model, tmp_path / "pipeline"),
    format="diffusers",
    pipeline=tmp_path / "source",
  )
  config = experiment.defaults("flux")
  config.model.update(schema.to_dict(case.model))
  config.data.update(image_size=(4, 8), channels=4, batch_size=BATCH)
  config = configs.overridden(config, case.flags, name)
  run = parts.build(config, jax.devices()[:1])
  ours = drawing.build(run, config.sample, BATCH)(
    weights, texts, seed=0, starts=start_BHWC
  )
  theirs = run_theirs(tmp_path / "pipeline", case, texts, start_BHWC)
  assert_same(ours, theirs, start_BHWC)
