"""Against the DiT of diffusers, on the same weights.

It differs from the paper's code in two constants (the last of 128 frequencies
is 1 / 10000 there, and epsilon of the norms is 1e-5), which are set right
first.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.models import dit

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
embeddings = pytest.importorskip("diffusers.models.embeddings")

Theirs = diffusers.DiTTransformer2DModel

CONFIG = dit.DiTConfig(
  image_size=(8, 8),
  width=48,
  depth=3,
  heads=4,
  num_classes=10,
  out_channels=8,
  position="sincos2d",
)


def build_theirs(config):
  theirs = Theirs(
    num_attention_heads=config.heads,
    attention_head_dim=config.head_size,
    in_channels=config.channels,
    out_channels=config.channels_out,
    num_layers=config.depth,
    sample_size=config.image_size[0],
    patch_size=config.patch_size,
    num_embeds_ada_norm=config.num_classes,
    norm_eps=1e-6,
  )
  for block in theirs.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
  return theirs.eval()


def load(theirs, params, config):
  """Copies our parameters into their names and layouts."""
  d, patch = config.width, config.patch_size
  state = {}

  def put(name, kernel, bias):
    state[f"{name}.weight"] = np.asarray(kernel).reshape(-1, bias.size).T
    state[f"{name}.bias"] = np.asarray(bias).reshape(-1)

  def put_block(prefix, ours):
    attention, mlp = ours["attention"], ours["mlp"]
    put(f"{prefix}.norm1.linear", **ours["modulation"])
    for part, name in enumerate(("to_q", "to_k", "to_v")):
      kernel = attention["qkv"]["kernel"][:, part].reshape(d, d)
      put(f"{prefix}.attn1.{name}", kernel, attention["qkv"]["bias"][part])
    put(f"{prefix}.attn1.to_out.0", **attention["out"])
    put(f"{prefix}.ff.net.0.proj", **mlp["in"])
    put(f"{prefix}.ff.net.2", **mlp["out"])
    emb = f"{prefix}.norm1.emb"
    for ours_name, name in (("in", "linear_1"), ("out", "linear_2")):
      put(f"{emb}.timestep_embedder.{name}", **params["time_embed"][ours_name])
    table = params["label_embed"]["embedding"]
    state[f"{emb}.class_embedder.embedding_table.weight"] = table

  kernel = params["patch_embed"]["kernel"].reshape(patch, patch, -1, d)
  state["pos_embed.proj.weight"] = kernel.transpose(3, 2, 0, 1)
  state["pos_embed.proj.bias"] = params["patch_embed"]["bias"]
  for layer in range(config.depth):
    put_block(
      f"transformer_blocks.{layer}",
      jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"]),
    )
  put("proj_out_1", **params["final"]["modulation"])
  put("proj_out_2", **params["final"]["out"])
  state = {name: torch.tensor(np.array(a)) for name, a in state.items()}
  missing, unexpected = theirs.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}


@pytest.fixture(scope="module")
def both():
  """Returns velocities and gradients, ours and theirs."""
  rng = np.random.default_rng(0)
  net = models.build(CONFIG)
  params = jax.tree.map(
    lambda leaf: (0.05 * rng.standard_normal(leaf.shape)).astype(np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  x_BHWC = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
  weight_BHWC = rng.standard_normal((3, 8, 8, 8)).astype(np.float32)
  t_B = np.asarray([0.02, 0.5, 0.97], np.float32)
  label_B = np.asarray([4, 0, CONFIG.num_classes], np.int32)

  @jax.jit
  def ours(params, x_BHWC):
    def scalar(params, x_BHWC):
      v_BHWC = net.apply(params, x_BHWC, t_B, {"label": label_B})
      return jnp.sum(weight_BHWC * v_BHWC), v_BHWC

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x_BHWC)

  (gradient, x_gradient), v_BHWC = ours(params, x_BHWC)

  theirs = build_theirs(CONFIG)
  load(theirs, params, CONFIG)
  x = torch.tensor(x_BHWC.transpose(0, 3, 1, 2), requires_grad=True)
  v = theirs(
    x,
    timestep=torch.tensor(1000.0 * t_B),
    class_labels=torch.tensor(label_B, dtype=torch.long),
  ).sample
  torch.sum(v * torch.tensor(weight_BHWC.transpose(0, 3, 1, 2))).backward()
  return types.SimpleNamespace(
    v=np.asarray(v_BHWC),
    their_v=v.detach().numpy().transpose(0, 2, 3, 1),
    x_gradient=np.asarray(x_gradient),
    their_x_gradient=x.grad.numpy().transpose(0, 2, 3, 1),
    gradient=gradient,
    theirs=theirs,
  )


def assert_close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_velocities_agree(both):
  assert np.abs(both.their_v).mean() > 0.1
  assert_close(both.v, both.their_v)


@pytest.mark.slow(1)
def test_gradients_of_the_image_agree(both):
  assert_close(both.x_gradient, both.their_x_gradient)


def test_gradients_of_parameters_agree(both):
  blocks = both.theirs.transformer_blocks
  for layer, block in enumerate(blocks):
    ours = jax.tree.map(lambda leaf, i=layer: leaf[i], both.gradient["blocks"])
    qkv = ours["attention"]["qkv"]["kernel"].reshape(CONFIG.width, 3, -1)
    assert_close(qkv[:, 0], block.attn1.to_q.weight.grad.numpy().T)
    assert_close(qkv[:, 2], block.attn1.to_v.weight.grad.numpy().T)
    assert_close(
      ours["mlp"]["in"]["kernel"], block.ff.net[0].proj.weight.grad.numpy().T
    )
    assert_close(
      ours["modulation"]["kernel"].reshape(CONFIG.width, -1),
      block.norm1.linear.weight.grad.numpy().T,
    )
  # Theirs has a copy of the embedders in each block; ours is shared by all.
  tables = [
    block.norm1.emb.class_embedder.embedding_table.weight.grad.numpy()
    for block in blocks
  ]
  assert_close(both.gradient["label_embed"]["embedding"], sum(tables))


@pytest.mark.parametrize("size", dit.SIZES)
def test_parameters_are_as_many(size):
  config = dit.DiTConfig(**dit.SIZES[size], out_channels=8, position="sincos2d")
  with torch.device("meta"):
    theirs = build_theirs(config)
  shared = theirs.transformer_blocks[0].norm1.emb
  once, copies = (
    sum(p.numel() for p in module.parameters()) for module in (theirs, shared)
  )
  shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
  ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
  assert ours == once - (config.depth - 1) * copies


def test_the_fixed_table_is_theirs():
  table = embeddings.get_2d_sincos_pos_embed(
    48, 7, base_size=7, output_type="pt"
  )
  ours = models.dit.positions.sincos2d(7, 7, 48)
  np.testing.assert_allclose(ours, table.numpy(), atol=1e-6)


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_identity_attention_is_that_of_perturbed_attention_guidance(layers):
  attention = pytest.importorskip("diffusers.models.attention_processor")
  rng = np.random.default_rng(1)
  net = models.build(CONFIG)
  params = jax.tree.map(
    lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  theirs = build_theirs(CONFIG)
  load(theirs, params, CONFIG)
  for layer in layers:
    theirs.transformer_blocks[layer].attn1.set_processor(
      attention.PAGIdentitySelfAttnProcessor2_0()
    )
  x_BHWC = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
  t_B = np.asarray([0.2, 0.7], np.float32)
  label_B = np.asarray([4, 0], np.int32)
  # Their processor sees [as it is; perturbed].
  twice = [
    torch.tensor(np.concatenate([a, a]))
    for a in (x_BHWC.transpose(0, 3, 1, 2), 1000.0 * t_B, label_B)
  ]
  with torch.no_grad():
    both = theirs(
      twice[0], timestep=twice[1], class_labels=twice[2].long()
    ).sample.numpy()
  plain, perturbed = np.split(both.transpose(0, 2, 3, 1), 2)
  inputs = (params, x_BHWC, t_B, {"label": label_B})
  degraded = models.with_identity_attention(net, layers)
  assert_close(jax.jit(net.apply)(*inputs), plain)
  assert_close(jax.jit(degraded)(*inputs), perturbed)
  assert np.abs(plain - perturbed).max() > 0.05 * np.abs(plain).max()
