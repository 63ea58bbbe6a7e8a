"""The exported PyTorch network is ours: outputs, gradients and samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import models
from flowjax.flow import guidance, paths, solvers, times
from flowjax.interop import dit, safetensors, tables, torch_export
from flowjax.models import blocks, layers
from flowjax.models import dit as models_dit

torch = pytest.importorskip("torch")

# Every pair of options meets; the four kinds of image go round.
IMAGES = [
  dict(image_size=image_size, out_channels=out_channels)
  for image_size in ((4, 4), (4, 6))
  for out_channels in (None, 3)
]
OPTIONS = [
  dict(position=position, mlp=mlp, qk_norm=qk_norm)
  | IMAGES[(2 * is_second + qk_norm + turn) % 4]
  for turn, position in enumerate(models_dit.POSITIONS)
  for is_second, mlp in enumerate(blocks.MLPS)
  for qk_norm in (False, True)
]
# RMSNorm, and constants that are nobody's default.
UNEVEN = dict(
  norm="rmsnorm",
  mlp_norm_epsilon=0.01,
  frequency_shift=1.0,
  patch_size=1,
  width=24,
  mlp="swiglu",
  mlp_ratio=2.7,
  rope_theta=50.0,
  timestep_scale=10.0,
)


@pytest.fixture
def exported(tiny, draw, tmp_path):
  """Returns a function that exports a tiny DiT and opens it in torch."""

  def build(**options):
    config = tiny(**options)
    params = draw(config)
    torch_export.export(params, config, tmp_path)
    module = torch_export.load_module(tmp_path)
    return models.build(config), params, module, module.load(tmp_path)

  return build


def nchw(x_BHWC):
  return torch.from_numpy(np.array(x_BHWC)).permute(0, 3, 1, 2)


def nhwc(x_BCHW):
  return x_BCHW.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
  "options", [*OPTIONS, UNEVEN, {"depth": 1, "num_classes": 0}], ids=str
)
def test_outputs_agree(tiny, draw, tmp_path, options):
  config = tiny(**options)
  params = draw(config)
  torch_export.export(params, config, tmp_path)
  network = models.build(config)
  assert torch_export.verify(tmp_path, network, params) <= 1e-5


def test_verify_sees_a_weight_that_differs(tiny, draw, tmp_path):
  config = tiny(depth=1)
  params = draw(config)
  torch_export.export(params, config, tmp_path)
  params["label_embed"]["embedding"][-1] += 0.1
  assert torch_export.verify(tmp_path, models.build(config), params) > 1e-4


def test_verify_compares_in_float32_whatever_the_run_computed_in(
  tiny, draw, tmp_path
):
  config = tiny(depth=1, dtype="bfloat16", remat="full")
  params = draw(config)
  torch_export.export(params, config, tmp_path)
  assert torch_export.verify(tmp_path, models.build(config), params) <= 1e-5


@pytest.mark.slow
def test_gradients_agree_in_every_parameter(exported):
  network, params, _, theirs = exported(
    mlp="swiglu", qk_norm=True, image_size=(4, 6)
  )
  rng = np.random.default_rng(2)
  x_BHWC = rng.standard_normal((3, 4, 6, 2), np.float32)
  towards_BHWC = rng.standard_normal((3, 4, 6, 2), np.float32)
  t_B = np.array([0.1, 0.5, 0.9], np.float32)
  label_B = np.array([0, 3, 1])

  def score(params, x_BHWC):
    cond = {"label": jnp.asarray(label_B)}
    return jnp.sum(network.apply(params, x_BHWC, t_B, cond) * towards_BHWC)

  ours, ours_x = jax.jit(jax.grad(score, argnums=(0, 1)))(params, x_BHWC)
  x_BCHW = nchw(x_BHWC).requires_grad_()
  out_BCHW = theirs(x_BCHW, torch.from_numpy(t_B), torch.from_numpy(label_B))
  (out_BCHW * nchw(towards_BHWC)).sum().backward()

  np.testing.assert_allclose(nhwc(x_BCHW.grad), ours_x, atol=1e-5)
  gradients = dict(theirs.named_parameters())
  back = dit.torch_layout(network.config).to_ours(
    {key: value.grad.numpy() for key, value in gradients.items()}
  )
  expected = tables.flatten(ours)
  for path, gradient in tables.flatten(back).items():
    # Label 2 is not in the batch; every other leaf is reached everywhere.
    assert np.any(gradient), path
    np.testing.assert_allclose(
      gradient, expected[path], rtol=1e-4, atol=2e-5, err_msg=path
    )


def test_times_are_embedded_alike(exported):
  _, _, module, _ = exported(depth=1)
  t_B = np.linspace(0.0, 1000.0, 999, dtype=np.float32)
  angle = module.time_angles(torch.from_numpy(t_B), 128)
  waves = torch.cat([angle.cos(), angle.sin()], dim=-1).numpy()
  np.testing.assert_allclose(layers.sinusoid(t_B, 256), waves, atol=1e-6)


def test_norms_agree_where_epsilon_matters(exported):
  _, _, module, net = exported(depth=1)
  rng = np.random.default_rng(4)
  x_BTD = 1e-3 * rng.standard_normal((2, 3, 8), np.float32)
  shift_BD, scale_BD = rng.standard_normal((2, 2, 8), np.float32)
  ours = layers.modulated_norm(x_BTD, shift_BD, scale_BD)
  x, shift, scale = map(torch.from_numpy, (x_BTD, shift_BD, scale_BD))
  theirs = net.final.norm(x, shift[:, None], scale[:, None])
  np.testing.assert_allclose(theirs, ours, atol=1e-5)

  norm = module.RMSNorm(8)
  norm.weight.data = scale[0]
  ours = layers.RMSNorm().apply({"params": {"scale": scale_BD[0]}}, x_BTD)
  np.testing.assert_allclose(norm(x).detach(), ours, atol=1e-5)


@pytest.mark.parametrize("missing", [True, False])
def test_keys_are_strict(tiny, draw, tmp_path, missing):
  config = tiny(depth=1)
  torch_export.export(draw(config), config, tmp_path)
  path = tmp_path / "model.safetensors"
  weights = {k: np.array(v) for k, v in safetensors.read(path).items()}
  if missing:
    del weights["final.out_proj.bias"]
  else:
    weights["stray"] = np.zeros(3, np.float32)
  shapes = {key: value.shape for key, value in weights.items()}
  safetensors.write(path, shapes, weights.items(), dtype="float32")
  name = "final.out_proj.bias" if missing else "stray"
  with pytest.raises(RuntimeError, match=name):
    torch_export.load_module(tmp_path).load(tmp_path)


def test_the_state_dict_reads_as_one_of_pytorch(exported):
  _, _, _, theirs = exported(qk_norm=True, position="learned")
  shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
  assert shapes["patch_embed.weight"] == (16, 8)
  assert shapes["blocks.1.attention.qkv.weight"] == (48, 16)
  assert shapes["blocks.0.attention.query_norm.weight"] == (8,)
  assert shapes["blocks.0.modulation.bias"] == (96,)
  assert shapes["label_embed.weight"] == (4, 16)
  assert shapes["pos_embed.weight"] == (4, 16)


def test_bfloat16_weights_load_as_float32_and_run_in_either(
  tiny, draw, tmp_path
):
  config = tiny(depth=1)
  torch_export.export(draw(config), config, tmp_path, dtype="bfloat16")
  network, params = models.build(config), torch_export.load(tmp_path)
  assert torch_export.verify(tmp_path, network, params) <= 1e-5
  module = torch_export.load_module(tmp_path)
  full = module.load(tmp_path)
  half = module.load(tmp_path, dtype=torch.bfloat16)
  assert full.patch_embed.weight.dtype == torch.float32
  labels = torch.tensor([0, 1])
  a, b = (module.sample(net, labels, steps=3) for net in (full, half))
  assert a.dtype == b.dtype == torch.float32
  assert 0 < (a - b).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
  "solver, scale, interval, shift",
  [
    ("euler", 1.0, (0.0, 1.0), 1.0),
    ("euler", 3.0, (0.3, 0.8), 2.0),
    ("heun", 3.0, (0.0, 1.0), 2.0),
    ("heun", 3.0, (0.3, 0.8), 1.0),
  ],
)
def test_samples_agree(exported, solver, scale, interval, shift):
  network, params, module, theirs = exported(depth=1)
  rng = np.random.default_rng(3)
  noise_BHWC = rng.standard_normal((3, 4, 4, 2), np.float32)
  label_B = np.array([0, 1, 2])
  cond = {"label": jnp.asarray(label_B)}
  field = guidance.classifier_free(
    lambda x_BHWC, t_B, cond: network.apply(params, x_BHWC, t_B, cond),
    cond,
    network.unconditional(cond),
    scale=scale,
    interval=interval,
  )
  ours_BHWC = jax.jit(
    lambda x_BHWC: solvers.solve(
      solvers.build(solver, paths.straight()),
      field,
      x_BHWC,
      times.uniform_grid(5, shift),
    )
  )(noise_BHWC)
  sampled_BCHW = module.sample(
    theirs,
    torch.from_numpy(label_B),
    steps=5,
    solver=solver,
    guidance=scale,
    interval=interval,
    shift=shift,
    noise_BCHW=nchw(noise_BHWC),
  )
  np.testing.assert_allclose(nhwc(sampled_BCHW), ours_BHWC, atol=2e-5)


def test_a_seed_means_the_same_noise_however_it_is_drawn(exported):
  _, _, module, theirs = exported(depth=1)
  labels = torch.tensor([0, 1])
  first = module.sample(theirs, labels, steps=2, seed=1)
  again = module.sample(theirs, labels, steps=2, seed=1)
  other = module.sample(theirs, labels, steps=2, seed=2)
  assert torch.equal(first, again)
  assert not torch.equal(first, other)


def test_an_unknown_solver_is_refused(exported):
  _, _, module, theirs = exported(depth=1)
  with pytest.raises(ValueError, match="'rk5'"):
    module.sample(theirs, torch.tensor([0]), solver="rk5")
