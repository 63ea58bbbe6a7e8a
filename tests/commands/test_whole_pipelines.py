"""Whole pipelines of diffusers: in, pictures from prompts, and out again.

Tiny ones with random weights, one of SD3 and one of FLUX; what we say and draw
is compared with what diffusers says and draws.
"""

# Shape suffixes: B batch, H height, W width, C channels.

import dataclasses
import importlib
import json
import pathlib
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from flowjax import __main__ as door
from flowjax import errors
from flowjax.commands import encode, pipeline
from flowjax.data import config as data_config
from flowjax.data import sources
from flowjax.evaluate import sampling
from flowjax.interop import frozen, pipelines
from flowjax.models import flux, mmdit
from flowjax.parallel import mesh as meshes
from flowjax.train import experiment, workdir

pytestmark = pytest.mark.usefixtures(
  "on_one_device", "traced_once", "hashed_by_numpy"
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
tokenizers = pytest.importorskip("tokenizers")

PROMPTS = ["a photo of a red cat", "two words, and then many more " * 9]
NEGATIVE = "a blue dog"
LENGTH, T5_WIDTH = 16, 32
SIZE = 16  # pixels, of which the autoencoder makes 8 x 8 latents
KINDS = ("sd3", "flux")
DEVICES = jax.devices()  # All, over which parts are read where it is said.


def clip_tokenizer():
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>")
  )
  made.normalizer = tokenizers.normalizers.Lowercase()
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    end_of_word_suffix="</w>",
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  made.train_from_iterator([*PROMPTS, NEGATIVE], trainer)
  model = json.loads(made.to_str())["model"]
  # The end of a text has the highest number, as in the published one.
  vocabulary = sorted(model["vocab"], key=model["vocab"].get)
  vocabulary += ["<|startoftext|>", "<|endoftext|>"]
  return transformers.CLIPTokenizer(
    {token: i for i, token in enumerate(vocabulary)},
    [tuple(merge) for merge in model["merges"]],
    model_max_length=LENGTH,
  )


def t5_tokenizer():
  made = tokenizers.Tokenizer(tokenizers.models.Unigram())
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  trainer = tokenizers.trainers.UnigramTrainer(
    vocab_size=50, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
  )
  made.train_from_iterator([*PROMPTS, NEGATIVE], trainer)
  scored = [tuple(p) for p in json.loads(made.to_str())["model"]["vocab"]]
  extra = [(f"<extra_id_{i}>", 0.0) for i in range(3, -1, -1)]
  return transformers.T5TokenizerFast(
    vocab=[*scored, *extra], extra_ids=4, model_max_length=512
  )


def loud(model, seed):
  """Gives a model weights of which each is heard."""
  rng = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if value.ndim > 1:
        spread = 0.3 if "embed" in name else 0.5 / np.sqrt(value[0].numel())
        value.copy_(torch.randn(value.shape, generator=rng) * spread)
      elif "norm" not in name:
        value.copy_(torch.randn(value.shape, generator=rng) * 0.1)
  return model.eval()


def clip_encoder(tokens, seed, *, projected, end):
  cls = transformers.CLIPTextModelWithProjection
  config = transformers.CLIPTextConfig(
    vocab_size=tokens,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=LENGTH,
    projection_dim=12,
    bos_token_id=tokens - 2,
    eos_token_id=end,
    hidden_act="gelu" if seed == 2 else "quick_gelu",
  )
  return loud((cls if projected else transformers.CLIPTextModel)(config), seed)


def t5_encoder():
  config = transformers.T5Config(
    vocab_size=64,  # More than its tokens, so that devices can divide it.
    d_model=T5_WIDTH,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
  )
  return loud(transformers.T5EncoderModel(config), 3)


def autoencoder():
  return loud(
    diffusers.AutoencoderKL(
      down_block_types=("DownEncoderBlock2D",) * 2,
      up_block_types=("UpDecoderBlock2D",) * 2,
      block_out_channels=(8, 16),
      layers_per_block=1,
      latent_channels=4,
      norm_num_groups=4,
      sample_size=SIZE,
      scaling_factor=1.5,
      shift_factor=0.1,
      use_quant_conv=False,
      use_post_quant_conv=False,
    ),
    4,
  )


def build(kind):
  clip, t5 = clip_tokenizer(), t5_tokenizer()
  ends = 2, clip.eos_token_id
  parts = dict(vae=autoencoder(), tokenizer=clip)
  if kind == "sd3":
    transformer = diffusers.SD3Transformer2DModel(
      sample_size=8,
      in_channels=4,
      out_channels=4,
      num_layers=2,
      attention_head_dim=8,
      num_attention_heads=4,
      joint_attention_dim=T5_WIDTH,
      caption_projection_dim=32,
      pooled_projection_dim=24,
      pos_embed_max_size=12,
    )
    return diffusers.StableDiffusion3Pipeline(
      **parts,
      transformer=loud(transformer, 5),
      scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
      text_encoder=clip_encoder(len(clip), 1, projected=True, end=ends[0]),
      text_encoder_2=clip_encoder(len(clip), 2, projected=True, end=ends[1]),
      tokenizer_2=clip,
      text_encoder_3=t5_encoder(),
      tokenizer_3=t5,
    )
  transformer = diffusers.FluxTransformer2DModel(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=T5_WIDTH,
    pooled_projection_dim=16,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
  )
  return diffusers.FluxPipeline(
    **parts,
    transformer=loud(transformer, 6),
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
      use_dynamic_shifting=True
    ),
    text_encoder=clip_encoder(len(clip), 1, projected=False, end=ends[1]),
    text_encoder_2=t5_encoder(),
    tokenizer_2=t5,
  )


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
  """Returns a kind, their pipeline, and the folder in which they saved it."""
  folder = tmp_path_factory.mktemp(request.param) / "pipeline"
  made = build(request.param)
  made.set_progress_bar_config(disable=True)
  made.save_pretrained(folder)
  return request.param, made, folder


@pytest.fixture(autouse=True, scope="module")
def _parts_are_read_once():
  """Keeps what commands read of a folder, and the programs of it."""
  read, made = frozen.Frozen._part, {}

  def part(self, name):
    key = self.folder, self.mesh, self.dtype, name
    if key not in made:
      made[key] = read(self, name)
    return made[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frozen.Frozen, "_part", part)
    yield


@pytest.fixture(scope="module")
def parts(saved):
  """Returns what of the pipeline is frozen, as it is read on one device."""
  return frozen.open(saved[2], dtype="float32")


@pytest.fixture(scope="module")
def run(saved):
  """Returns the workdir into which the pipeline was brought."""
  kind, _, folder = saved
  directory = folder.parent / "first"
  # Of FLUX no file says how large its images are.
  words = [] if kind == "sd3" else [
    f"--config.{group}.image_size=(8, 8)" for group in ("model", "data")
  ]  # fmt: skip
  command("import", f"--from={folder}", f"--workdir={directory}", *words)
  # A workdir may be moved.
  return directory.rename(folder.parent / "run")


def command(*words):
  assert door.main(list(map(str, words))) in (0, None), words


def mesh():
  return meshes.build(meshes.MeshConfig(data=1, fsdp=4, tensor=2), DEVICES)


@pytest.mark.slow(1)
def test_texts_are_those_of_encode_prompt(saved):
  kind, theirs, folder = saved
  parts = frozen.open(folder, mesh=mesh(), dtype="float32", text_tokens=20)
  found = parts.texts(PROMPTS)
  told = dict(prompt=PROMPTS, prompt_2=None, max_sequence_length=20)
  with torch.no_grad():
    if kind == "sd3":
      text, _, pooled, _ = theirs.encode_prompt(
        **told, prompt_3=None, do_classifier_free_guidance=False
      )
    else:
      text, pooled, _ = theirs.encode_prompt(**told)
  assert sorted(found) == ["pooled", "text"]
  assert parts.text_length == found["text"].shape[1]
  np.testing.assert_allclose(found["text"], text.numpy(), atol=1e-4)
  np.testing.assert_allclose(found["pooled"], pooled.numpy(), atol=1e-4)
  require_places(parts, found)
  cut = {
    name: cut_N.tolist() for name, cut_N in parts.truncated(PROMPTS).items()
  }
  assert cut == dict.fromkeys(pipelines.encoders(parts.index), [False, True])


def require_places(parts, found):
  """Requires that `parts` cover what is not zero, and each number once."""
  text, pooled = (np.zeros(found[key].shape[1:], int) for key in
                  ("text", "pooled"))  # fmt: skip
  for place, name in zip(
    parts.parts, pipelines.encoders(parts.index), strict=True
  ):
    assert place.name == name
    if place.tokens:
      text[slice(*place.tokens), slice(*place.columns)] += 1
    if place.pooled:
      pooled[slice(*place.pooled)] += 1
  np.testing.assert_array_equal(text, (found["text"] != 0).all(axis=0))
  assert (pooled == 1).all()
  # And they are those of the encoder.
  name = parts.parts[1].name
  alone_BLE = parts._encoded(name, PROMPTS)[0]
  box = (slice(*parts.parts[1].tokens), slice(*parts.parts[1].columns))
  np.testing.assert_array_equal(found["text"][:, *box], alone_BLE)


def test_over_a_mesh_each_device_keeps_its_slice(saved):
  _, _, folder = saved
  parts = frozen.open(folder, mesh=mesh(), dtype="bfloat16")
  for name, cls in pipelines.encoders(parts.index).items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      parts._part(name).params
    ):
      assert leaf.dtype == jax.numpy.bfloat16
      if leaf.size > 600:  # A table of positions is divided four ways.
        shard = leaf.addressable_shards[0].data
        ways = 4 if "pos_embed" in str(path) else 8
        assert leaf.size == ways * shard.size, (cls, path)
  parts.free()
  assert not parts._held


def test_without_t5_its_tokens_are_zeros(saved, tmp_path):
  kind, _, folder = saved
  if kind == "flux":
    return
  shutil.copytree(folder, tmp_path / "small")
  shutil.rmtree(tmp_path / "small" / "text_encoder_3")
  change(tmp_path / "small", text_encoder_3=[None, None])
  theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(
    tmp_path / "small", text_encoder_3=None
  )
  parts = frozen.open(tmp_path / "small", dtype="float32")
  found = parts.texts(PROMPTS[:1])
  with torch.no_grad():
    text, _, pooled, _ = theirs.encode_prompt(
      PROMPTS[0], None, None, do_classifier_free_guidance=False
    )
  np.testing.assert_allclose(found["text"], text.numpy(), atol=1e-4)
  np.testing.assert_allclose(found["pooled"], pooled.numpy(), atol=1e-4)
  assert not found["text"][:, LENGTH:].any()


@pytest.mark.slow(1)
def test_images_go_to_latents_and_back_as_theirs(saved, parts):
  _, theirs, _ = saved
  rng = np.random.default_rng(0)
  x_BHWC = rng.uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)
  vae = theirs.vae
  with torch.no_grad():
    said = vae.encode(torch.tensor(x_BHWC).permute(0, 3, 1, 2)).latent_dist
    factor, shift = vae.config.scaling_factor, vae.config.shift_factor
    mean = ((said.mean - shift) * factor).permute(0, 2, 3, 1)
    decoded = vae.decode(said.mean).sample.permute(0, 2, 3, 1)
  mean_BHWC, log_variance_BHWC = parts.encode(x_BHWC)
  np.testing.assert_allclose(mean_BHWC, mean.numpy(), atol=1e-4)
  std = np.exp(0.5 * log_variance_BHWC)
  wanted = factor * said.std.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(std, wanted, rtol=1e-4)
  y_BHWC = parts.decode(mean_BHWC, at_once=2)
  np.testing.assert_allclose(y_BHWC, decoded.numpy(), atol=1e-4)


@pytest.mark.slow(1)
def test_large_pictures_can_be_made_in_tiles(saved):
  kind, theirs, folder = saved
  if kind == "flux":  # Its autoencoder is the same.
    return
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=1), DEVICES[:2])
  parts = frozen.open(folder, mesh=mesh, dtype="float32")
  z_NHWC = noise(3, (12, 8))  # Tiles are of 8x8.
  vae = theirs.vae
  factor, shift = vae.config.scaling_factor, vae.config.shift_factor
  vae.enable_tiling()
  with torch.no_grad():
    z = torch.tensor(z_NHWC).permute(0, 3, 1, 2) / factor + shift
    wanted = vae.decode(z).sample.permute(0, 2, 3, 1).numpy()
  vae.disable_tiling()
  found = pipeline.pictures(parts, z_NHWC, tiled=True)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert np.abs(found - pipeline.pictures(parts, z_NHWC)).max() > 1e-2


def test_a_fingerprint_tells_another_pipeline(saved, tmp_path):
  _, theirs, folder = saved
  first = frozen.open(folder).fingerprint()
  assert json.loads(json.dumps(first)) == first
  assert first["vae"]["scaling_factor"] == 1.5
  shutil.copytree(folder, tmp_path / "other")
  path = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
  data = bytearray(path.read_bytes())
  data[-1] ^= 64
  path.write_bytes(data)
  other = frozen.open(tmp_path / "other")
  second = other.fingerprint()
  assert first["vae"] != second.pop("vae")
  assert {key: first[key] for key in second} == second
  (tmp_path / "other" / "vae" / "config.json").unlink()
  with pytest.raises(errors.UserError, match="config.json cannot be read"):
    other.fingerprint()


@pytest.mark.slow(3)
def test_what_is_encoded_once_is_what_the_parts_say(saved, parts, tmp_path):
  _, _, folder = saved
  rng = np.random.default_rng(0)
  captions = [*PROMPTS, NEGATIVE]
  for i, prompt in enumerate(captions):
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / f"{i}.txt").write_text(prompt)
  config = tmp_path / "config.py"
  config.write_text(
    "from flowjax.train import experiment\n"
    "get_config = lambda: experiment.defaults('mmdit')\n"
  )
  out = tmp_path / "out"
  command(
    "encode", f"--config={config}", f"--out={out}", "--splits=train",
    f"--config.pipeline={folder}", f"--config.data.source=folder:{tmp_path}",
    f"--config.data.image_size=({SIZE}, {SIZE})", "--config.data.channels=3",
    "--config.data.held_out=0.0", "--compute_dtype=float32", "--batch_size=8",
    "--dtype=float32",
  )  # fmt: skip
  command("encode", "--verify", f"--out={out}")
  data = data_config.DataConfig(
    source=f"arrayrecord:{out}", image_size=(8, 8), channels=4
  )
  stored = sources.open(data, "train")
  found = stored.gather(np.arange(3))
  every = [*captions, ""]
  told = parts.texts(every)
  for key in ("text", "pooled"):
    np.testing.assert_allclose(found[key], told[key][:-1], atol=1e-4)
    empty = told[key][-1]
    np.testing.assert_allclose(stored.encoded.empty[key], empty, atol=1e-4)
  image_BHWC = np.stack(
    [
      np.asarray(PIL.Image.open(tmp_path / f"{i}.png"), np.float32) / 127.5 - 1
      for i in range(3)
    ]
  )
  mean_BHWC, log_variance_BHWC = parts.encode(image_BHWC)
  np.testing.assert_allclose(found["mean"], mean_BHWC, atol=1e-4)
  np.testing.assert_allclose(
    found["log_variance"], log_variance_BHWC, atol=1e-3
  )
  assert [part.name for part in stored.encoded.texts.parts] == list(
    pipelines.encoders(parts.index)
  )
  # Each box holds what its encoder says, and nothing of another.
  for part in parts.parts:
    text_BLE, pooled_BP = parts._encoded(part.name, every)
    if part.tokens:
      box = told["text"][:, slice(*part.tokens), slice(*part.columns)]
      np.testing.assert_array_equal(box, text_BLE)
    if part.pooled:
      np.testing.assert_array_equal(
        told["pooled"][:, slice(*part.pooled)], pooled_BP
      )
  # A run that names the pipeline is of these latents, and of no others.
  model = mmdit.MMDiTConfig(image_size=(8, 8), channels=4, num_classes=0)
  run = experiment.Experiment(model=model, data=data, pipeline=str(folder))
  encode.refuse_others(run, tmp_path)
  other = shutil.copytree(folder, tmp_path / "other")
  content = json.loads((other / "vae/config.json").read_text())
  content["scaling_factor"] = 0.25
  (other / "vae/config.json").write_text(json.dumps(content))
  run = dataclasses.replace(run, pipeline=str(other))
  with pytest.raises(errors.DataError, match="scaling_factor: 1.5 -> 0.25"):
    encode.refuse_others(run, tmp_path)


def noise(count, size=(8, 8)):
  return np.random.default_rng(7).standard_normal((count, *size, 4), np.float32)


def their_images(theirs, kind, starts, **options):
  """Returns the images that diffusers draws from the same noise, in [-1, 1]."""
  z_BCHW = torch.tensor(starts).permute(0, 3, 1, 2)
  height, width = (2 * side for side in starts.shape[1:3])
  if kind == "flux":
    batch, channels, h, w = z_BCHW.shape
    z_BCHW = theirs._pack_latents(z_BCHW, batch, channels, h, w)
  out = theirs(
    prompt=PROMPTS,
    latents=z_BCHW,
    height=height,
    width=width,
    output_type="pt",
    num_inference_steps=3,
    **options,
  )
  return 2.0 * out.images.permute(0, 2, 3, 1).numpy() - 1.0


def our_images(directory, tmp_path, starts, *words):
  np.save(tmp_path / "starts.npy", starts)
  command(
    "sample",
    f"--workdir={directory}",
    *(f"--prompt={prompt}" for prompt in PROMPTS),
    f"--start={tmp_path / 'starts.npy'}",
    f"--out={tmp_path / 'images.npy'}",
    "--steps=3",
    *words,
  )
  return np.clip(np.load(tmp_path / "images.npy"), -1.0, 1.0)


@pytest.mark.slow
def test_prompts_become_the_pictures_that_diffusers_draws(
  saved, run, tmp_path, capsys
):
  kind, theirs, _ = saved
  wide = (8, 12) if kind == "sd3" else (8, 8)
  told, words = {}, []
  if kind == "sd3":
    told, words = (
      {"negative_prompt": NEGATIVE},
      [f"--negative-prompt={NEGATIVE}"],
    )
  starts = noise(len(PROMPTS), wide)
  size = "x".join(str(2 * side) for side in wide)
  found = our_images(run, tmp_path, starts, f"--size={size}", *words)
  assert "1 of" in capsys.readouterr().out  # The long prompt is said to be cut.
  wanted = their_images(theirs, kind, starts, **told)
  assert wanted.std() > 0.1
  np.testing.assert_allclose(found, wanted, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_images_are_changed_as_diffusers_changes_them(
  saved, run, tmp_path, monkeypatch, masked
):
  kind, theirs, _ = saved
  if kind == "sd3" and masked:
    pytest.skip("Their SD3 inpaints latents of 16 channels alone.")
  module = {
    ("sd3", False): "stable_diffusion_3.pipeline_stable_diffusion_3_img2img",
    ("flux", False): "flux.pipeline_flux_img2img",
    ("flux", True): "flux.pipeline_flux_inpaint",
  }[kind, masked]
  module = importlib.import_module(f"diffusers.pipelines.{module}")
  start = np.asarray(
    sampling.noise(0, np.arange(len(PROMPTS), dtype=np.uint32), (8, 8, 4))
  )
  monkeypatch.setattr(
    module,
    "randn_tensor",
    lambda *args, **options: torch.tensor(start).permute(0, 3, 1, 2),
  )
  monkeypatch.setattr(
    module, "retrieve_latents", lambda out, **options: out.latent_dist.mode()
  )
  name = {"sd3": "StableDiffusion3", "flux": "Flux"}[kind]
  name += "InpaintPipeline" if masked else "Img2ImgPipeline"
  pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
  image = PIL.Image.fromarray(pixels)
  image.save(tmp_path / "image.png")
  options, words = {"strength": 0.6}, ["--strength=0.6"]
  if masked:
    # Each latent is wholly kept or wholly drawn anew.
    black = np.zeros((SIZE, SIZE), np.uint8)
    black[4:12, 6:] = 255
    options["mask_image"] = PIL.Image.fromarray(black)
    options["mask_image"].save(tmp_path / "mask.png")
    words.append(f"--mask={tmp_path / 'mask.png'}")
  changing = getattr(module, name).from_pipe(theirs)
  changing.set_progress_bar_config(disable=True)
  out = changing(
    prompt=PROMPTS,
    image=image,
    height=SIZE,
    width=SIZE,
    output_type="pt",
    num_inference_steps=5,
    guidance_scale={"sd3": 7.0, "flux": 3.5}[kind],  # As ours is imported.
    **options,
  )
  wanted = 2.0 * out.images.permute(0, 2, 3, 1).numpy() - 1.0
  command(
    "sample",
    f"--workdir={run}",
    *(f"--prompt={prompt}" for prompt in PROMPTS),
    f"--init-image={tmp_path / 'image.png'}",
    f"--out={tmp_path / 'images.npy'}",
    "--steps=5",
    *words,
  )
  found = np.clip(np.load(tmp_path / "images.npy"), -1.0, 1.0)
  assert wanted.std() > 0.1
  np.testing.assert_allclose(found, wanted, atol=2e-3)


@pytest.mark.slow
def test_out_again_it_is_the_same_pipeline(saved, run, tmp_path):
  kind, theirs, folder = saved
  config = workdir.read_config(run)
  assert config.pipeline == pipeline.FOLDER
  out = tmp_path / "out"
  command("export", f"--workdir={run}", "--format=diffusers", f"--out={out}")
  files = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
  for name in files - {p for p in files if p.parts[0] == "transformer"}:
    assert (out / name).read_bytes() == (folder / name).read_bytes(), name
  cls = type(theirs)
  again = cls.from_pretrained(out)
  again.set_progress_bar_config(disable=True)
  starts = noise(len(PROMPTS))
  # Of SD3 the table of positions is computed anew, and differs in last digits.
  np.testing.assert_allclose(
    their_images(again, kind, starts),
    their_images(theirs, kind, starts),
    atol=1e-4,
  )


@pytest.mark.slow(1)
def test_a_run_of_a_run_keeps_the_parts_too(run, tmp_path):
  config = workdir.read_config(run)
  lines = pipeline.keep(config, run, tmp_path)
  assert "text_encoder_2" in lines[0] and str(tmp_path) in lines[0]
  first, second = (
    frozen.open(pipeline.folder(directory, config)).fingerprint()
    for directory in (run, tmp_path)
  )
  assert first == second
  # What was trained on pixels has none to keep.
  assert pipeline.keep(config, tmp_path, tmp_path / "no") == []


def test_what_is_sampled_by_itself_is_as_the_pipeline(saved, run):
  kind, _, _ = saved
  sample = workdir.read_config(run).sample
  assert (sample.steps, sample.solver.name) == (28, "euler")
  if kind == "sd3":
    assert (sample.grid.shift, sample.guidance.scale) == (3.0, 7.0)
  else:
    assert sample.grid.shift_by == "flux"
    assert (sample.guidance.name, sample.guidance.scale) == ("distilled", 3.5)


def test_a_scheduler_that_no_config_describes_is_left(saved, tmp_path, caplog):
  kind, _, folder = saved
  other = shutil.copytree(folder, tmp_path / "other")
  network = flux.FluxConfig() if kind == "flux" else mmdit.MMDiTConfig()
  for changes in (
    {"use_karras_sigmas": True},
    {"num_train_timesteps": 500},
    {"use_dynamic_shifting": True, "max_shift": 1.3},
    {"_class_name": "EulerDiscreteScheduler"},
  ):
    shutil.copytree(
      folder / "scheduler", other / "scheduler", dirs_exist_ok=True
    )
    change(other, "scheduler/scheduler_config.json", **changes)
    assert pipeline.sampling(other, network) == {}, changes
    assert "cannot say what this scheduler does" in caplog.text
    caplog.clear()


def test_sizes_and_folders_that_cannot_be_are_refused(saved, run):
  _, _, folder = saved
  parts = frozen.open(folder)
  assert pipeline.latent_size(parts, (16, 24)) == (8, 12)
  with pytest.raises(errors.UserError, match="as --size=16x16"):
    pipeline.latent_size(parts, (17, 16))
  with pytest.raises(errors.UserError, match="there is no folder"):
    pipeline.folder(folder, workdir.read_config(run))
  with pytest.raises(errors.UserError, match="in float16 T5 overflows"):
    frozen.open(folder, dtype="float16")
  assert door.main(["sample", f"--workdir={run}", "--size=16"]) == 2
  assert door.main(["sample", f"--workdir={run}", "--tiles", "--latents"]) == 2


def change(folder, name=pipelines.INDEX, **changes):
  path = pathlib.Path(folder) / name
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  "spoil, text",
  [
    (
      lambda f: change(f, text_encoder=["transformers", "BertModel"]),
      "text_encoder is 'BertModel', where a",
    ),
    (lambda f: change(f, vae=["diffusers", "VQModel"]), "vae is 'VQModel'"),
    (lambda f: shutil.rmtree(f / "tokenizer_2"), "names 'tokenizer_2', and"),
    (
      lambda f: [p.unlink() for p in (f / "tokenizer").glob("*")],
      "holds no tokenizer",
    ),
    (
      lambda f: (f / "text_encoder_2" / "model.safetensors").rename(
        f / "text_encoder_2" / "pytorch_model.bin"
      ),
      "is a pickle",
    ),
    (
      lambda f: change(f, "vae/config.json", latent_channels=16),
      "16 channels, and the network draws 4",
    ),
    (
      lambda f: change(f, "transformer/config.json", pooled_projection_dim=10),
      "pooled_width = .*, and the transformer reads 10",
    ),
  ],
)
def test_parts_that_do_not_fit_are_refused(saved, tmp_path, spoil, text):
  kind, _, folder = saved
  if kind == "flux" and "'tokenizer_2'" not in text:
    return
  shutil.copytree(folder, tmp_path / "spoilt")
  spoil(tmp_path / "spoilt")
  with pytest.raises(errors.UserError, match=text):
    if "pooled" in text:
      config = mmdit.MMDiTConfig(
        text_width=T5_WIDTH, pooled_width=10, channels=4
      )
      frozen.open(tmp_path / "spoilt").check(config)
    else:
      source = tmp_path / "spoilt"
      network = mmdit.MMDiTConfig if kind == "sd3" else flux.FluxConfig
      config = network(channels=4, text_width=T5_WIDTH)
      pipelines.read(source, config)
      frozen.open(source).check(config)
