"""Adapters cross the border: ours in diffusers and PEFT, theirs in ours."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from flowjax import errors, models
from flowjax.interop import folder_export, formats, tables
from flowjax.interop import lora as adapters
from flowjax.models import dit, flux, lora, mmdit

TEXT = dict(
  image_size=(4, 6),
  channels=2,
  heads=2,
  text_width=6,
  pooled_width=4,
  text_tokens=3,
)
NETWORKS = {
  "mmdit": mmdit.MMDiTConfig(
    **TEXT, head_size=8, depth=4, dual_layers=1, position_table=8
  ),
  "flux": flux.FluxConfig(
    **TEXT, width=16, double_depth=2, single_depth=2, rope_axes=(2, 2, 4)
  ),
  "dit": dit.DiTConfig(
    image_size=(4, 4),
    channels=2,
    width=16,
    depth=2,
    heads=2,
    num_classes=3,
    position="sincos2d",
    frequency_shift=1.0,
  ),
}
DEFAULT = lora.LoraConfig(rank=3)
WIDE = lora.LoraConfig(
  rank=2, alpha=3.0, targets=(r".*block.*/kernel", r"final/.*/kernel")
)


def draw(config, options, seed=0):
  """Returns the adapted network and parameters, none of them zero."""
  net = models.with_lora(models.build(config), options)
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    size = 0.2 if path[0].key == lora.GROUP else 0.1
    return size * rng.standard_normal(leaf.shape, np.float32)

  params = jax.tree_util.tree_map_with_path(
    one, jax.eval_shape(net.init, jax.random.key(0))
  )
  return net, params


def inputs(net, batch=2):
  rng = np.random.default_rng(1)
  shape = (batch, *net.config.image_size, net.config.channels)
  cond = {
    key: rng.integers(0, 3, value.shape).astype(value.dtype)
    for key, value in net.example(batch).items()
  }
  t_B = np.array([0.2, 0.9], np.float32)
  return rng.standard_normal(shape, np.float32), t_B, cond


def base(params):
  return {key: params[key] for key in params if key != lora.GROUP}


def written(folder, name="mmdit", options=DEFAULT, **more):
  config = NETWORKS[name]
  net, params = draw(config, options)
  adapters.export(params, config, options, folder, **more)
  return config, net, params


def rewrite(folder, change=lambda tensors: tensors, told=None):
  """Writes the file of a folder anew, as others might have written it."""
  path = folder / adapters.FILE
  tensors = change(safetensors.numpy.load_file(path))
  about = {} if told is None else {"lora_adapter_metadata": json.dumps(told)}
  safetensors.numpy.save_file(tensors, path, about)
  return path


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [DEFAULT, WIDE], ids=["default", "wide"])
def test_what_is_written_is_read_the_same(tmp_path, name, options):
  config, _, params = written(tmp_path / "out", name, options)
  found = adapters.read(tmp_path / "out", config)
  wanted = tables.flatten({"lora": params["lora"]})
  assert found.leaves.keys() == wanted.keys()
  for path, leaf in wanted.items():
    np.testing.assert_array_equal(found.leaves[path], leaf, path)
  assert found.config.rank == options.rank
  assert found.config.scale == options.scale
  # The targets are the kernels by name, and give the same tree again.
  again = draw(config, found.config)[1]
  assert jax.tree.structure(again) == jax.tree.structure(params)


def test_the_keys_are_those_of_diffusers(tmp_path):
  config, _, params = written(tmp_path / "out", "flux")
  tensors = safetensors.numpy.load_file(tmp_path / "out" / adapters.FILE)
  layout = formats.layout(config, "diffusers").keys
  for key, tensor in tensors.items():
    module, _, factor = key.removeprefix("transformer.").partition(".lora_")
    outputs, read = layout[f"{module}.weight"]
    assert factor in ("A.weight", "B.weight")
    shape = (3, read) if factor == "A.weight" else (outputs, 3)
    assert tensor.shape == shape
  # One kernel of ours is only a part of the inputs of this one.
  out = tensors[
    "transformer.single_transformer_blocks.1.proj_out.lora_A.weight"
  ]
  a = params["lora"]["single_blocks"]["attention"]["out"]["kernel"]["a"][1]
  np.testing.assert_array_equal(out[:, :16], a.reshape(16, 3).T)
  assert not out[:, 16:].any() and out.shape == (3, 16 + 64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_is_stored_as_asked(tmp_path, dtype):
  config, _, params = written(tmp_path / "out", dtype=dtype)
  found = adapters.read(tmp_path / "out", config).leaves
  for path, leaf in tables.flatten({"lora": params["lora"]}).items():
    rounded = np.asarray(jax.numpy.asarray(leaf).astype(dtype), np.float32)
    np.testing.assert_array_equal(found[path], rounded, path)


def test_layers_and_parts_without_adapters_have_zeros(tmp_path):
  config, _, params = written(tmp_path / "out", "flux")
  kept = "transformer.transformer_blocks.1.attn.to_v"

  def change(tensors):
    return {key: tensors[key] for key in tensors if key.startswith(kept)}

  rewrite(tmp_path / "out", change)
  found = adapters.read(tmp_path / "out", config)
  name = "double_blocks/image/attention/qkv/kernel"
  assert found.config == lora.LoraConfig(3, 3.0, (name,))
  for factor in "ab":
    leaf = found.leaves[f"lora/{name}/{factor}"]
    assert leaf[1, 2].any()
    assert not leaf[0].any() and not leaf[1, :2].any()
  # And none of them is written again.
  adapted = {**base(params), **tables.unflatten(found.leaves)}
  adapters.export(adapted, config, found.config, tmp_path / "again")
  keys = safetensors.numpy.load_file(tmp_path / "again" / adapters.FILE).keys()
  assert keys == {f"{kept}.lora_A.weight", f"{kept}.lora_B.weight"}


@pytest.mark.parametrize(
  "told, factor",
  [
    (None, 1.0),  # diffusers takes the rank for an alpha that is not said.
    (dict(r=3, lora_alpha=6), 2.0),
    (dict(r=3, lora_alpha=6, use_rslora=True), 6 / 3**0.5),
    (dict(r=3, lora_alpha=3, alpha_pattern={"attn1.to_q": 9}), 3.0),
    (dict(r=3, lora_alpha=3, alpha_pattern={"^attn1.to_q": 9}), 1.0),
  ],
)
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_alpha_is_what_the_header_says(tmp_path, told, factor, prefix):
  config, _, params = written(tmp_path / "out", "dit")

  def queries(tensors):
    names = {key: prefix + key.removeprefix("transformer.") for key in tensors}
    return {names[key]: tensors[key] for key in tensors if "to_q" in key}

  if told is not None:
    told = {prefix + key: value for key, value in told.items()}
  rewrite(tmp_path / "out", queries, told)
  found = adapters.read(tmp_path / "out", config)
  pair = params["lora"]["blocks"]["attention"]["qkv"]["kernel"]
  path = "lora/blocks/attention/qkv/kernel/"
  a, b = found.leaves[path + "a"], found.leaves[path + "b"]
  np.testing.assert_array_equal(a[:, 0], pair["a"][:, 0])
  np.testing.assert_allclose(
    found.config.scale * b[:, 0], factor * pair["b"][:, 0], rtol=1e-6
  )


def test_an_adapter_of_a_joined_linear_is_shared(tmp_path):
  """One that PEFT made reads all inputs by one a, into one b."""
  config, _, _ = written(tmp_path / "out", "flux")
  module = "transformer.single_transformer_blocks.{}.proj_out.lora_{}.weight"
  rng = np.random.default_rng(0)
  tensors = {
    module.format(layer, factor): rng.standard_normal(shape, np.float32)
    for layer in range(2)
    for factor, shape in (("A", (3, 80)), ("B", (16, 3)))
  }
  rewrite(tmp_path / "out", lambda _: tensors)
  found = adapters.read(tmp_path / "out", config)
  assert found.config.targets == (
    "single_blocks/attention/out/kernel",
    "single_blocks/mlp/out/kernel",
  )
  whole = tensors[module.format(1, "B")] @ tensors[module.format(1, "A")]
  leaves = tables.unflatten(found.leaves)["lora"]["single_blocks"]
  for kind, part in (("attention", whole[:, :16]), ("mlp", whole[:, 16:])):
    pair = leaves[kind]["out"]["kernel"]
    got = pair["a"][1].reshape(-1, 3) @ pair["b"][1]
    np.testing.assert_allclose(got, part.T, rtol=1e-5, atol=1e-5)


def test_what_diffusers_has_no_adapter_for_is_refused(tmp_path):
  for name, target, reason in (
    ("mmdit", "patch_embed/kernel", "patch_embed/kernel is a convolution"),
    ("dit", "time_embed/in/kernel", "time_embed/in/kernel is held once per"),
  ):
    options = lora.LoraConfig(rank=2, targets=(target,))
    with pytest.raises(errors.UserError, match=reason) as error:
      written(tmp_path / "out", name, options)
    assert "--format=diffusers" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_adapters_of_text_encoders_are_left(tmp_path, caplog):
  config, _, params = written(tmp_path / "out")
  name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}."

  def more(tensors):
    ones = {f"{name.format(x)}weight": np.ones((2, 2), "f4") for x in "AB"}
    return {**tensors, **ones}

  found = adapters.read(rewrite(tmp_path / "out", more), config)
  wanted = tables.flatten({"lora": params["lora"]})
  assert found.leaves.keys() == wanted.keys()
  assert "2 tensors are of text encoders" in caplog.text


def test_what_does_not_fit_is_refused_by_name(tmp_path):
  config, _, _ = written(tmp_path / "out")
  key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"

  def without(tensors):
    return {k: v for k, v in tensors.items() if k != key}

  def rows(tensors):
    return {k: v[:2] if k == key else v for k, v in tensors.items()}

  def more(tensors):
    return {**tensors, "transformer.a.lora_A.weight": np.ones((3, 2), "f4")}

  def empty(tensors):
    return {k: v[:0] if k == key else v for k, v in tensors.items()}

  def magnitude(tensors):
    name = key.replace("lora_A", "lora_magnitude_vector")
    return {**tensors, name: np.ones(3, "f4")}

  original = safetensors.numpy.load_file(tmp_path / "out" / adapters.FILE)
  for change, message in (
    (without, f"missing +{key}"),
    (rows, rf"mis-shaped +{key} \[2, 16\], should be \[3, 16\]"),
    (more, r"unmapped +transformer.a.lora_A.weight"),
    (empty, rf"{key} \[0, 16\] has no rank"),
    (magnitude, "unmapped .*lora_magnitude_vector"),
    (lambda tensors: {"lora_unet.down": np.ones(2, "f4")}, "no key that ends"),
  ):
    path = rewrite(tmp_path / "out", lambda _, f=change: f(dict(original)))
    with pytest.raises(errors.CheckpointError, match=message):
      adapters.read(path, config)
  for told, message in (
    ({"use_dora": True}, "DoRA"),
    ({"r": 2.5}, "r = 2.5 in its header"),
    ({"lora_alpha": "many"}, "lora_alpha = 'many'"),
    ({"alpha_pattern": {"(": 2}}, "alpha_pattern = .*in its header"),
    ({"alpha_pattern": [2]}, "alpha_pattern = "),
  ):
    told = {f"transformer.{name}": value for name, value in told.items()}
    path = rewrite(tmp_path / "out", lambda _: original, told=told)
    with pytest.raises(errors.UserError, match=message):
      adapters.read(path, config)
  pickle = tmp_path / "lora.bin"
  pickle.write_bytes(b"PK")
  with pytest.raises(errors.UserError, match="is a pickle"):
    adapters.read(pickle, config)
  with pytest.raises(errors.UserError, match="no such file"):
    adapters.read(tmp_path / "nothing", config)


@pytest.fixture(name="theirs", scope="module")
def _theirs(tmp_path_factory):
  """Returns a function that loads a base of ours in diffusers."""
  pytest.importorskip("torch")
  pytest.importorskip("peft")
  from flowjax.interop import diffusers_check

  def load(config, params):
    folder = tmp_path_factory.mktemp("base") / "base"
    folder_export.export(base(params), config, folder, format="diffusers")
    return diffusers_check.load(folder)

  return load


def output(theirs, net):
  """Returns what their network says of the inputs of ours."""
  import torch

  from flowjax.interop import diffusers_check

  x_BHWC, t_B, cond = inputs(net)
  with torch.no_grad():
    return diffusers_check.run(theirs, net.config, x_BHWC, t_B, cond).numpy()


def our_output(net, params):
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(net.apply)(params, *inputs(net)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmdit", "flux"])
@pytest.mark.parametrize("options", [DEFAULT, WIDE], ids=["default", "wide"])
def test_diffusers_loads_what_we_write(tmp_path, theirs, name, options):
  """Through the same doors as `load_lora_weights` of a pipeline."""
  from diffusers import loaders

  config, net, params = written(tmp_path / "out", name, options)
  model = theirs(config, params)
  mixin = dict(
    mmdit=loaders.SD3LoraLoaderMixin, flux=loaders.FluxLoraLoaderMixin
  )
  state, *alphas, metadata = mixin[name].lora_state_dict(
    tmp_path / "out",
    return_lora_metadata=True,
    **(dict(return_alphas=True) if name == "flux" else {}),
  )
  more = dict(network_alphas=alphas[0]) if alphas else {}
  before = output(model, net)
  mixin[name].load_lora_into_transformer(
    state, transformer=model, metadata=metadata, **more
  )
  ours = our_output(net, params)
  np.testing.assert_allclose(output(model, net), ours, atol=2e-5)
  assert np.abs(before - ours).max() > 0.01
  # Merged weights are the same network again.
  merged = jax.jit(lora.merged, static_argnums=0)(options, params)
  found = output(theirs(config, merged), models.build(config))
  np.testing.assert_allclose(found, ours, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_we_read_what_peft_writes(tmp_path, theirs, name):
  import diffusers
  import peft
  import torch

  config = NETWORKS[name]
  bare = models.build(config)
  _, params = draw(config, DEFAULT)
  model = theirs(config, params)
  targets = dict(
    mmdit=["to_q", "to_k", "add_v_proj", "attn.to_out.0", "ff.net.2"],
    flux=[
      "to_q",
      "to_v",
      "to_add_out",
      "ff.net.0.proj",
      "proj_out",
      "norm1.linear",
    ],
    dit=["to_q", "to_out.0", "ff.net.2", "proj_out_2"],
  )
  made = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=targets[name],
    init_lora_weights=False,
    alpha_pattern={"attn.to_q": 10, "attn1.to_q": 10},
  )
  torch.manual_seed(0)
  if name == "dit":  # A class without adapters of its own: PEFT is asked.
    peft.inject_adapter_in_model(made, model)
    state = peft.get_peft_model_state_dict(model)
    about = made.to_dict() | {"target_modules": targets[name]}
    tensors = {key: state[key].contiguous().numpy() for key in state}
    safetensors.numpy.save_file(
      tensors,
      tmp_path / adapters.FILE,
      {"lora_adapter_metadata": json.dumps(about, default=str)},
    )
  else:
    model.add_adapter(made)
    mixin = dict(mmdit=diffusers.StableDiffusion3Pipeline,
                 flux=diffusers.FluxPipeline)[name]  # fmt: skip
    mixin.save_lora_weights(
      tmp_path,
      transformer_lora_layers=peft.get_peft_model_state_dict(model),
      transformer_lora_adapter_metadata=made.to_dict()
      | {"target_modules": targets[name]},
    )
  read = adapters.read(tmp_path, config)
  ours = {**base(params), **tables.unflatten(read.leaves)}
  wanted = our_output(models.with_lora(bare, read.config), ours)
  np.testing.assert_allclose(output(model, bare), wanted, atol=2e-5)
  without = our_output(bare, base(params))
  assert np.abs(without - wanted).max() > 0.01


@pytest.mark.slow
def test_peft_loads_what_we_write_for_a_dit(tmp_path, theirs):
  import peft
  import torch

  config, net, params = written(tmp_path / "out", "dit", WIDE)
  model = theirs(config, params)
  path = tmp_path / "out" / adapters.FILE
  with safetensors.safe_open(path, "numpy") as file:
    told = json.loads(file.metadata()["lora_adapter_metadata"])
  fields = {k.removeprefix("transformer."): v for k, v in told.items()}
  state = {
    key.removeprefix("transformer."): torch.as_tensor(tensor)
    for key, tensor in safetensors.numpy.load_file(path).items()
  }
  peft.inject_adapter_in_model(
    peft.LoraConfig(**fields), model, state_dict=state
  )
  result = peft.set_peft_model_state_dict(model, state)
  assert not result.unexpected_keys
  ours = our_output(net, params)
  np.testing.assert_allclose(output(model, net), ours, atol=2e-5)
