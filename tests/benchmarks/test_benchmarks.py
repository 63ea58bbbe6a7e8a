"""The benchmarks measure what they say: the same work, and the real step."""

import collections
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import child
import gpu_train
import jax
import jax.numpy as jnp
import measure
import numpy as np
import parent
import pytest
import side_flowjax
import text_networks
import traces
import workload

from flowjax import models
from flowjax.flow import times
from flowjax.interop import dit as layouts
from flowjax.models import dit

ROOT = pathlib.Path(__file__).parents[2]
HAS_TORCH = importlib.util.find_spec("torch") is not None
TINY = workload.Workload(size="tiny", batch=4, threads=1)
# Compiles fast, as these tests do; what is compiled stays the same.
QUICK = " ".join(
  flag
  for flag in os.environ["XLA_FLAGS"].split()
  if not flag.startswith("--xla_force_host_platform_device_count")
)
# What a machine for benchmarks need not have.
NOT_THERE = (
  *("ml_collections", "grain", "clu", "tensorboardX", "tensorflow"),
  *("tensorflow_datasets", "sklearn", "matplotlib"),
)
FAST_COMPILE = {"xla_backend_optimization_level": 0}
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not here")


def test_sizes_are_those_of_the_models():
  sizes = {key: workload.SIZES[key] for key in dit.SIZES}
  assert sizes == dit.SIZES


def test_settings_are_read_from_words():
  work = TINY.changed("batch=2,scan=no,xla=--xla_flag=1")
  assert work == dataclasses.replace(
    TINY, batch=2, scan=False, xla="--xla_flag=1"
  )
  with pytest.raises(ValueError, match="'bach=2' is no setting"):
    TINY.changed("bach=2")


def test_formula_is_the_published_one():
  xl = workload.Workload(size="xl")
  # 118.6 G multiply-adds forward (arXiv:2212.09748, table 4).
  assert xl.forward_flops() / 2e9 == pytest.approx(118.6, abs=0.05)
  assert xl.train_flops() == 3 * xl.forward_flops()


@pytest.mark.parametrize("size", workload.SIZES)
def test_formula_counts_the_blocks_of_the_network(size):
  work = workload.Workload(size=size)
  config = dit.DiTConfig(**work.model())
  d, tokens = config.width, work.tokens
  patches = 2 * tokens * 4 * (4 + 4) * d
  time_embed, final_modulation = 2 * (256 * d + d * d), 2 * d * 2 * d
  outside = patches + time_embed + final_modulation
  assert models.build(config).flops == work.forward_flops() + outside


@pytest.mark.parametrize("size", text_networks.SIZES)
def test_formula_counts_the_blocks_of_networks_of_text(size):
  work = workload.Workload(size=size)
  network = models.build(models.CONFIGS[work.kind](**work.model()))
  model, config = work.model(), network.config
  d, times = config.width, 2 if work.kind == "flux" else 1
  patches = 2 * work.tokens * model["channels"] * 4
  outside = (
    2 * d * (patches + model["text_tokens"] * model["text_width"])
    + 2 * d * (256 * times + model["pooled_width"] + (times + 1) * d)
    + 2 * d * 2 * d
  )
  assert network.flops == work.forward_flops() + outside


def test_the_flux_that_is_measured_is_as_large_as_is_said():
  work = workload.Workload(size="flux_4096")
  network = models.build(models.CONFIGS["flux"](**work.model()))
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert round(count / 1e9, 2) == 2.56
  # Weights, gradients, two moments and the average.
  assert round(5 * 4 * count / 1e9) == 51
  assert work.tokens == 4096 and network.config.text_tokens == 512


TEXTS = ["flux_tiny", "mmdit_tiny"]


def _text_sides(size):
  """Returns FlowJAX's step, its weights, and PyTorch's side with them."""
  import side_torch
  import torch

  from flowjax.interop import formats

  work = workload.Workload(size=size, batch=4, threads=1)
  made = side_flowjax.make_step(work, jax.devices()[0])
  params = jax.tree.map(np.asarray, made.initial().params)
  trainer = side_torch.Trainer(work, torch.device("cpu"))
  table = formats.layout(made.network.config, "diffusers")
  state = {k: torch.from_numpy(x.copy()) for k, x in table.to_theirs(params)}
  trainer.model.load_state_dict(state, strict=True)
  return made, params, trainer


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("size", TEXTS)
def test_both_sides_of_text_do_the_same_and_as_much(size):
  pytest.importorskip("diffusers")
  import torch
  from torch.nn import attention
  from torch.utils import flop_counter

  made, params, trainer = _text_sides(size)
  rng = np.random.default_rng(0)
  image, text, pooled = (
    rng.standard_normal(made.batch[key].shape, np.float32)
    for key in ("image", "text", "pooled")
  )
  t_B = np.linspace(0.1, 0.9, 4, dtype=np.float32)
  v_BHWC = jax.jit(made.network.apply)(
    params, image, t_B, {"text": text, "pooled": pooled}
  )
  plain = attention.sdpa_kernel(attention.SDPBackend.MATH)
  counter = flop_counter.FlopCounterMode(display=False)
  with torch.no_grad(), plain, counter:
    found = trainer.network.velocity(
      *map(torch.from_numpy, (image.transpose(0, 3, 1, 2).copy(), t_B)),
      *map(torch.from_numpy, (text, pooled)),
    )
  theirs_BHWC = found.numpy().transpose(0, 2, 3, 1)
  assert np.std(theirs_BHWC) > 1e-4
  np.testing.assert_allclose(v_BHWC, theirs_BHWC, atol=1e-5)
  assert counter.get_total_flops() == 4 * made.network.flops
  drop_B = torch.tensor([True, False, False, True])
  dropped = trainer.network.dropped(
    drop_B, torch.from_numpy(text), torch.from_numpy(pooled)
  )
  for x, before in zip(dropped, (text, pooled), strict=True):
    assert not x[[0, 3]].any() and x[1].equal(torch.from_numpy(before)[1])


@needs_torch
def test_both_sides_multiply_as_often():
  import torch
  from torch.nn import attention
  from torch.utils import flop_counter

  from flowjax.interop.torch import dit as torch_dit

  model = torch_dit.DiT(torch_dit.Config(**TINY.model()))
  batch = (torch.ones(1, 4, 32, 32), torch.ones(1), torch.ones(1).long())
  # The counter knows plain matrix products, and no fused attention of CPUs.
  plain = attention.sdpa_kernel(attention.SDPBackend.MATH)
  with plain, flop_counter.FlopCounterMode(display=False) as counter:
    model(*batch)
  network = models.build(dit.DiTConfig(**TINY.model()))
  assert counter.get_total_flops() == network.flops


@pytest.mark.slow(1)
def test_the_step_is_the_one_that_trains():
  from flowjax.commands import configs
  from flowjax.train import loop, parts

  work = dataclasses.replace(TINY, size="s", remat="dots")
  config = configs.load(
    str(ROOT / "configs/imagenet_dit.py:s_2"),
    [
      "--config.model.dtype=float32",
      "--config.model.remat=dots",
      f"--config.data.batch_size={work.batch}",
    ],
  )
  device = jax.devices()[0]
  real = loop.lower_step(parts.build(config, [device])).as_text()
  assert side_flowjax.make_step(work, device).lower().as_text() == real


@pytest.fixture(scope="module")
def made():
  return side_flowjax.make_step(TINY, jax.devices()[0])


@pytest.fixture(scope="module")
def params(made):
  return jax.tree.map(np.asarray, made.initial().params)


def _trainer(table, params):
  """Returns PyTorch's side with these weights, also as its average."""
  import side_torch
  import torch

  trainer = side_torch.Trainer(TINY, torch.device("cpu"))
  trainer.model.load_state_dict(
    {key: torch.from_numpy(x.copy()) for key, x in table.to_theirs(params)}
  )
  for mean, param in zip(trainer.ema, trainer.params, strict=True):
    mean.copy_(param.detach())
  return trainer


@needs_torch
@pytest.mark.slow
def test_a_step_of_both_sides_does_the_same(made, params):
  import torch

  compiled = made.lower().compile(FAST_COMPILE)
  state = made.initial()
  rng = np.random.default_rng(0)
  image = rng.standard_normal(made.batch["image"].shape, np.float32)
  label = np.arange(TINY.batch, dtype=np.int32)

  table = layouts.torch_layout(made.network.config)
  trainer = _trainer(table, params)
  before = dict(table.to_theirs(params))
  assert sum(x.size for x in before.values()) == sum(
    x.numel() for x in trainer.params
  )
  batch = {
    key: jax.device_put(value, made.batch[key].sharding)
    for key, value in (("image", image), ("label", label))
  }
  law, losses = times.logit_normal(), []
  for step in range(3):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 3)
    drop = jax.random.bernoulli(keys[2], workload.LABEL_DROPOUT, label.shape)
    draws = (
      image.transpose(0, 3, 1, 2),
      np.asarray(jax.random.normal(keys[1], image.shape)).transpose(0, 3, 1, 2),
      np.asarray(law.sample(keys[0], label.shape)),
      np.where(drop, 1000, label),
    )
    state, metrics = compiled(state, batch)
    theirs = trainer.update(*(torch.from_numpy(x.copy()) for x in draws))
    losses.append((float(metrics["loss"]), float(theirs)))

  np.testing.assert_allclose(*np.transpose(losses), rtol=1e-5)
  # Adam divides by the gradient's own size: compared over the whole move, for
  # a single near-zero gradient says nothing.
  now = trainer.model.state_dict()
  names = [name for name, _ in trainer.model.named_parameters()]
  means = dict(zip(names, trainer.ema, strict=True))
  for ours, theirs in ((state.params, now), (state.ema, means)):
    moved, apart = 0.0, 0.0
    for key, value in table.to_theirs(ours):
      moved += float(np.square(value - before[key]).sum())
      apart += float(np.square(value - theirs[key].numpy()).sum())
    assert moved > 0.0
    assert apart < 1e-6 * moved


@pytest.mark.slow
@needs_torch
def test_outputs_and_gradients_are_the_same(made, params):
  import torch

  table = layouts.torch_layout(made.network.config)
  trainer = _trainer(table, params)
  rng = np.random.default_rng(1)
  x_BHWC, target_BHWC = rng.standard_normal((2, 4, 32, 32, 4), np.float32)
  t_B, label_B = np.linspace(0.0, 1.0, 4, dtype=np.float32), np.arange(4)

  def ours(params):
    v_BHWC = made.network.apply(params, x_BHWC, t_B, {"label": label_B})
    return jnp.mean(jnp.square(v_BHWC - target_BHWC)), v_BHWC

  run = jax.jit(jax.value_and_grad(ours, has_aux=True))
  (_, v_BHWC), grads = run.lower(params).compile(FAST_COMPILE)(params)
  x_BCHW, target_BCHW = (
    torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    for x in (x_BHWC, target_BHWC)
  )
  v_BCHW = trainer.model(
    x_BCHW, torch.from_numpy(t_B), torch.from_numpy(label_B)
  )
  torch.nn.functional.mse_loss(v_BCHW, target_BCHW).backward()

  theirs_BHWC = v_BCHW.detach().numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(v_BHWC, theirs_BHWC, atol=1e-5)
  for key, value in table.to_theirs(grads):
    grad = trainer.model.get_parameter(key).grad.numpy()
    assert np.linalg.norm(value) > 0.0, key
    scale = float(np.abs(value).max())
    np.testing.assert_allclose(value, grad, atol=1e-4 * scale, err_msg=key)


class Here:
  """Answers in this process what a child would in one of its own."""

  def __init__(self, work, log):
    log.touch()
    self.side = importlib.import_module(f"side_{work.library}").Side(work)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def ask(self, do, timeout, **values):
    assert timeout > 0.0
    found = child.answer(self.side, {"do": do, **values})
    return json.loads(json.dumps(found))


@pytest.mark.slow(8)
def test_gpu_script_runs_and_writes_what_it_promises(tmp_path, monkeypatch):
  """On FLUX. That children answer is seen of the script for CPUs."""
  process = parent.Child

  def started(work, log, caches):
    assert str(log.parent) in caches["JAX_COMPILATION_CACHE_DIR"]
    if work.remat == "bogus":  # It dies, and that is heard.
      return process(work, log, caches)
    return Here(work, log)

  monkeypatch.setattr(parent, "Child", started)
  monkeypatch.setitem(child.MATMUL_SIZE, "cpu", 256)
  has_theirs = HAS_TORCH and importlib.util.find_spec("diffusers") is not None
  sides = ["flowjax", *(["torch"] if has_theirs else [])]
  out = tmp_path / "result.json"
  words = [
    *("gpu_train.py", "--device=cpu", "--size=flux_tiny", f"--out={out}"),
    # In bfloat16 it would compile three times as long; below DiTs do.
    *("--dtype=float32", "--seconds=0.2", "--probe-seconds=0.1"),
    *("--kernels", "--sides", *sides),
    *("--flowjax-start", f"batch=2,xla={QUICK}", "batch=2,remat=bogus"),
    *("--flowjax-then", "--torch-start", "batch=2", "--torch-then"),
  ]
  monkeypatch.setattr(sys, "argv", words)
  gpu_train.main()
  result = json.loads(out.read_text())
  assert result["machine"]["date"] and result["machine"]["command"]
  assert result["train_gflops_per_image"] > 0
  _, refused = result["flowjax"]["trials"]
  assert "bogus" in refused["failed"]
  assert "bogus" in out.with_suffix(".log").read_text()
  for side in sides:
    row = result[side]["sustained"]
    for key in (
      *("images_per_second", "tflops", "mfu", "share_of_matmul"),
      *("step_seconds", "step_seconds_first", "step_seconds_last", "seconds"),
    ):
      assert row[key] > 0, key
    assert row["settings"]["batch"] == 2
    assert row["versions"] and row["device"]
    assert np.isfinite(row["loss"])
    assert row["seconds"] >= 0.2
    assert row["kernels"][0]["name"] == "all"
    images = row["steps"] * 2 / row["seconds"]
    assert row["images_per_second"] == pytest.approx(images)
    tflops = images * result["train_gflops_per_image"] / 1e3
    assert row["tflops"] == pytest.approx(tflops)
  assert result["flowjax"]["sustained"]["settings"]["xla_flags"] == QUICK
  if has_theirs:
    assert result["flowjax_over_torch"] > 0
    ours, theirs = (result[x]["sustained"]["parameters"] for x in sides)
    assert ours == theirs


@needs_torch
def test_torch_steps_in_bfloat16_over_weights_in_float32(monkeypatch):
  import side_torch
  import torch

  monkeypatch.setitem(child.MATMUL_SIZE, "cpu", 16)
  side = side_torch.Side(dataclasses.replace(TINY, dtype="bfloat16"))
  seen = []
  hook = torch.nn.modules.module.register_module_forward_hook(
    lambda module, given, found: seen.append((type(module), found.dtype))
  )
  try:
    side.build()
  finally:
    hook.remove()
  assert (torch.nn.Linear, torch.bfloat16) in seen
  assert {param.dtype for param in side.trainer.params} == {torch.float32}
  assert np.isfinite(side.report()["loss"])


def test_settings_to_begin_with_are_settings():
  for size in ("xl", "flux_1024", "mmdit_4096"):
    for library in gpu_train.LIBRARIES:
      found = gpu_train.starts(size, library)
      works = {TINY.changed(text) for text in found}
      assert len(works) == len(found) > 1
  assert gpu_train.starts("flux_4096", "torch") == [
    "batch=8,compile=blocks",
    "batch=4,compile=blocks",
  ]


def test_what_was_cut_is_said():
  said = gpu_train.describe(workload.Workload(size="flux_1024"))
  assert said["tokens"] == 1024
  assert "4 + 8 of its 19 + 38 blocks" in said["note"]
  assert "note" not in gpu_train.describe(TINY)


@pytest.mark.slow
def test_cpu_script_runs_and_writes_what_it_promises(tmp_path):
  for name in NOT_THERE:
    (tmp_path / f"{name}.py").write_text("raise ImportError('not there')")
  torch = ["torch_mkl_huge" if shutil.which("cc") else "torch"]
  torch = torch if HAS_TORCH else []
  out = tmp_path / "result.json"
  _run(
    "cpu_train.py",
    *("--size=tiny", "--batch=1", "--threads=1", f"--xla={QUICK}"),
    *("--rounds=1", "--depths", "1", f"--out={out}"),
    *("--variants", "flowjax_bf16", *torch),
    pythonpath=str(tmp_path),
  )
  result = json.loads(out.read_text())
  assert result["machine"]["cpu"] and result["machine"]["load_average"]
  assert result["cores_used_by_others"] >= 0
  assert result["compile"]["1"]["compile_seconds"] > 0
  assert set(result["variants"]) == {"flowjax_bf16", *torch}
  for row in result["variants"].values():
    assert len(row["step_seconds"]) == 1
    assert row["step_seconds_min"] == min(row["step_seconds"])
    share = row["gflops"] / row["matmul_gflops"]
    assert row["share_of_matmul"] == pytest.approx(share)
    flops = result["train_gflops_per_step"]
    assert row["gflops"] == pytest.approx(flops / row["step_seconds_min"])
    ours = result["variants"]["flowjax_bf16"]
    assert row["parameters"] == ours["parameters"]


class Counting:
  """A side on which a step is done when it is waited for."""

  def __init__(self):
    self.enqueued, self.most = [], 0

  def step(self):
    self.enqueued.append(object())
    self.most = max(self.most, len(self.enqueued))
    return self.enqueued[-1]

  def wait(self, handle):
    assert self.enqueued.pop(0) is handle


def test_sustained_keeps_one_step_ahead():
  side = Counting()
  found = measure.sustained(side, 0.0)
  assert not side.enqueued and side.most == 2
  assert found["steps"] == 4
  assert found["step_seconds"] == pytest.approx(found["seconds"] / 4)


def test_time_inside_an_operation_is_not_counted_twice():
  spans = [(0.0, 10.0, "while"), (1.0, 4.0, "dot"), (5.0, 9.0, "dot")]
  assert traces.own_time(spans) == collections.Counter({"dot": 7, "while": 3})


def test_a_child_that_does_not_answer_is_ended(tmp_path):
  work = dataclasses.replace(TINY, library="flowjax")
  started = parent.Child(work, tmp_path / "log")
  with pytest.raises(parent.Failed, match="within 0 s"):
    started.ask("build", timeout=0.1)
  assert started.process.poll() is not None


def _run(script, *flags, pythonpath):
  run = subprocess.run(
    [sys.executable, str(ROOT / "benchmarks" / script), *flags],
    env={**os.environ, "PYTHONPATH": pythonpath, "OMP_NUM_THREADS": "1"},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stdout + run.stderr
