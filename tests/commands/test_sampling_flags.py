"""What `flowjax sample` can be asked for, of networks that are not trained."""

import logging
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import __main__ as door
from flowjax import errors
from flowjax.commands import configs, restored, sample, train
from flowjax.models import dit
from flowjax.train import parts

pytestmark = pytest.mark.usefixtures("on_one_device", "traced_once")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIT = [
  "--config.model.patch_size=4",
  "--config.model.width=16",
  "--config.model.depth=2",
  "--config.model.heads=2",
  "--config.data.batch_size=16",
  "--config.mesh.data=1",
  "--config.mesh.fsdp=-1",
  "--config.sample.steps=2",
]
NF = ["--config.model.width=16", "--config.model.depth=2"]


def untrained(config, words):
  """Returns what `restored.open` would, with weights of no training."""
  run = parts.build(configs.load(f"{CONFIGS}/{config}", words))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32),
    run.abstract.params,
  )
  return restored.Restored(pathlib.Path("run"), run, 0, params, {})


@pytest.fixture(name="drawn")
def _drawn(tmp_path, monkeypatch):
  """Returns drawn(*words, config=, keys=): the images of `flowjax sample`.

  Where it fails, its exit code.
  """
  seen = []
  monkeypatch.setattr(
    sample.pictures, "grid", lambda images, columns: seen.append(images)
  )
  monkeypatch.setattr(sample.pictures, "save_png", lambda grid, out: None)

  def drawn(*words, config="digits_dit.py", keys=DIT):
    monkeypatch.setattr(
      restored, "open", lambda *args, **options: untrained(config, keys)
    )
    code = door.main(
      ["sample", "--workdir=run", f"--out={tmp_path}/grid.png", *words]
    )
    return code or seen.pop()

  return drawn


@pytest.mark.slow
def test_images_have_the_scales_in_turn(drawn):
  # In two batches, of which the second is padded.
  found = drawn("--num=20", "--guidance=1,1.5,4")
  single = [drawn("--num=20", f"--guidance={s}") for s in (1, 1.5, 4)]
  for i in range(20):
    np.testing.assert_allclose(found[i], single[i % 3][i], atol=1e-4)
    assert np.abs(found[i] - single[(i + 1) % 3][i]).max() > 1e-3


@pytest.mark.parametrize(
  ("words", "count"),
  [
    ([], 100),
    (["--guidance=1"], 100),
    (["--guidance=1,2,3"], 102),
    (["--labels=3,1,4"], 3),
    (["--labels=3,1,4", "--guidance=2,3"], 6),
    (["--labels=3,1,4", "--guidance=2,3,4"], 3),
    (["--guidance=2,3,4", "--num=2"], 2),
  ],
)
def test_there_are_as_many_images_as_use_all_scales(drawn, words, count):
  seen = []

  def draw(self, cond, *, scales, **options):
    labels = cond["label"]
    seen.append((labels, scales))
    return np.zeros((len(labels), 8, 8, 1))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(restored.Restored, "draw", draw)
    drawn(*words)
  ((labels, scales),) = seen
  assert len(labels) == count
  assert scales is None or len(scales) == count
  several = any(
    word.startswith("--guidance=") and "," in word for word in words
  )
  assert (scales is not None) == several


@pytest.mark.slow
@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize(
  ("scales", "largest"), [("1,1,1", 2), ("1", 2), ("1,1,3", 2), ("1,3", 4)]
)
def test_scales_of_one_cost_nothing(drawn, monkeypatch, scales, largest):
  rows, apply = [], dit.apply

  def counted(config, params, x_BHWC, *rest, **options):
    rows.append(len(x_BHWC))
    return apply(config, params, x_BHWC, *rest, **options)

  monkeypatch.setattr(dit, "apply", counted)
  # With two images the third scale is that of none.
  drawn("--num=2", f"--guidance={scales}")
  assert max(rows[1:]) == largest  # The first looks whether it fits the mesh.


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a", "1,", "1,,2", "nan", "1,inf", ""])
def test_what_is_no_list_of_numbers_is_refused(text, capsys):
  assert door.main(["sample", "--workdir=x", f"--guidance={text}"]) == 2
  assert "finite number" in capsys.readouterr().err
  assert door.main(["evaluate", "--workdir=x", "--guidance=1,2"]) == 2
  assert "--guidance" in capsys.readouterr().err


@pytest.mark.slow
def test_perturbed_attention_moves_the_samples(drawn):
  group = "--config.sample.guidance"
  perturbed = (f"{group}.perturbed_layers=(0,)", f"{group}.perturbed_scale=3.0")
  skipped = (f"{group}.skip_layers=(1,)", f"{group}.skip_scale=1.0")
  plain, one, both = (
    drawn("--num=3", *words) for words in ((), perturbed, perturbed + skipped)
  )
  assert np.abs(one - plain).max() > 1e-4
  assert np.abs(both - one).max() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("traced_anew")
def test_the_time_of_a_nan_is_said(drawn, monkeypatch, capsys):
  pytest.importorskip("diffrax")
  apply = dit.apply

  def broken(config, params, x_BHWC, t_B, *rest, **options):
    v_BHWC = apply(config, params, x_BHWC, t_B, *rest, **options)
    return jnp.where(t_B[:, None, None, None] < 0.4, jnp.nan, 0.1 * v_BHWC)

  monkeypatch.setattr(dit, "apply", broken)
  loose = (
    "--config.sample.solver.rtol=0.01",
    "--config.sample.solver.atol=0.01",
  )
  words = ("--num=3", "--solver=dopri5", "--guidance=1,2,3", *loose)
  assert drawn(*words) == 5
  said = capsys.readouterr().err
  assert "dopri5 stopped at t = 0.4, after" in said and "not finite" in said
  # It does not spin.
  assert int(said.split("after ")[1].split()[0]) < 500
  # A solver with a grid cannot tell.
  assert drawn("--num=3", "--solver=heun") == 5
  assert "3 of 3 samples are not finite" in capsys.readouterr().err


@pytest.mark.slow
def test_samples_with_a_learned_variance(drawn, capsys):
  learned, small = (
    drawn("--num=3", *words, config="digits_dit.py:iddpm")
    for words in ((), ("--config.sample.solver.variance=small",))
  )
  assert np.abs(learned - small).max() > 1e-2
  words = "--solver=ddpm", "--config.sample.solver.variance=learned"
  assert drawn("--num=3", *words) == 2
  assert "learns no variance" in capsys.readouterr().err


@pytest.mark.slow
def test_a_normalizing_flow_has_no_solver(drawn, capsys):
  flow = {"config": "digits_nf.py", "keys": NF}
  for word in (
    "--solver=heun",
    "--steps=8",
    "--grid=karras",
    "--config.sample.steps=8",
  ):
    assert drawn(word, **flow) == 2
    said = capsys.readouterr().err
    assert word.split("=")[0] in said and "neither a solver nor a grid" in said
  assert drawn("--guidance=2", **flow) == 2
  assert "no field to guide" in capsys.readouterr().err
  assert len(drawn("--num=3", "--guidance=1", **flow)) == 3


@pytest.fixture(name="array")
def _array(tmp_path, monkeypatch):
  """Returns array(*words): the samples that a .npy file gets, or exit code."""

  def array(*words, config="digits_dit.py", keys=DIT):
    monkeypatch.setattr(
      restored, "open", lambda *args, **options: untrained(config, keys)
    )
    out = tmp_path / "samples.npy"
    code = door.main(["sample", "--workdir=run", f"--out={out}", *words])
    return code or np.load(out)

  return array


@pytest.mark.slow
def test_arrays_come_out_and_noise_goes_in(array, tmp_path):
  start = np.random.default_rng(3).standard_normal((2, 8, 8, 1))
  np.save(tmp_path / "start.npy", start)
  flag = f"--start={tmp_path}/start.npy"
  found = array(flag, "--labels=1")
  assert found.shape == (2, 8, 8, 1) and found.dtype == np.float32
  twice = array(flag, "--labels=1", "--num=4", "--seed=9")
  np.testing.assert_allclose(twice, np.tile(found, (2, 1, 1, 1)), atol=1e-5)
  np.save(tmp_path / "start.npy", start[..., 0])
  assert array(flag) == 2


@pytest.mark.slow
def test_what_was_inverted_is_drawn_again(array, tmp_path, capsys):
  keys = [*DIT, "--config.sample.steps=40"]
  found = array("--invert", "--num=3", "--guidance=1", keys=keys)
  out = capsys.readouterr().out
  assert "3 held-out images as noise" in out
  away = float(out.split("differ by ")[1].split()[0])
  assert found.shape == (3, 8, 8, 1) and away < 0.05
  other = array("--invert", "--num=3", "--labels=0", keys=keys)
  assert np.abs(other - found).max() > 0.1
  assert array("--invert", "--solver=ddpm") == 2
  assert "draws noise" in capsys.readouterr().err
  assert array("--invert", f"--start={tmp_path}/start.npy") == 2


@pytest.mark.parametrize(
  ("words", "scale"),
  [
    ([], 1.0),
    (["--guidance=3"], 3.0),
    (["--config.sample.guidance.scale=3"], 3.0),
    (["--labels=0"], 1.5),
  ],
)
def test_what_is_inverted_is_drawn_unguided_unless_it_is_said(
  drawn, monkeypatch, capsys, words, scale
):
  seen = []

  def draw(self, cond, *, method, starts, inverse=False, **options):
    del self, cond, options
    seen.append((inverse, method.guidance.scale))
    return starts

  monkeypatch.setattr(restored.Restored, "draw", draw)
  drawn("--invert", "--num=2", *words)
  assert [inverse for inverse, _ in seen] == [True, False]
  assert seen[1] == (False, scale)
  said = capsys.readouterr().out
  assert f"drawn again at guidance scale {scale:g}, they differ by" in said


def test_what_was_inverted_is_drawn_again_by_the_sizes_given(
  drawn, monkeypatch
):
  seen = []

  def draw(self, cond, *, starts, **options):
    del self, options
    seen.append(cond.get("size_crop"))
    return starts

  monkeypatch.setattr(restored.Restored, "draw", draw)
  keys = [*DIT, "--config.model.size_conditioning=True"]
  drawn("--invert", "--num=1", "--crop=5,0", keys=keys)
  assert seen[0] is None  # To noise it goes as it is.
  np.testing.assert_array_equal(seen[1], [[8, 8, 5, 0, 8, 8]])


@pytest.mark.parametrize("word", ["--steps=8", "--grid=karras", "--shift=3"])
def test_a_solver_that_chooses_its_steps_has_no_grid(
  drawn, capsys, tmp_path, word
):
  pytest.importorskip("diffrax")
  assert drawn("--solver=dopri5", word) == 2
  said = capsys.readouterr().err
  assert f"{word.split('=')[0]}=" in said and "'dopri5' chooses its own" in said
  # `drawn` has put an untrained run in place of that of any workdir.
  words = [f"--workdir={tmp_path}", "--solver=tsit5", word]
  assert door.main(["evaluate", *words]) == 2
  assert "'tsit5' chooses its own" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "text"),
  [
    ([], None),
    (["--config.model.depth=1"], None),
    (["--config.model.num_classes=12"], "num_classes: 10 and 12"),
    (["--config.flow.path.name=vp"], "'name': 'straight'} and {'name': 'vp'"),
  ],
)
def test_a_worse_run_is_of_the_same_kind(monkeypatch, words, text):
  seen = []

  def open(directory, *, ema):
    seen.append(ema)
    return untrained("digits_dit.py", [*DIT, *words])

  better = untrained("digits_dit.py", DIT)
  monkeypatch.setattr(restored, "open", open)
  if text is None:
    assert restored.worse(pathlib.Path("w"), better, ema=False) is not None
    assert seen == [False]
    return
  with pytest.raises(errors.UserError) as found:
    restored.worse(pathlib.Path("w"), better)
  assert text in str(found.value)


def test_a_run_of_texts_is_no_worse_run_of_labels(monkeypatch):
  sizes = ["--config.model.image_size=(8, 8)", "--config.model.channels=16"]
  better = untrained("sd3.py:medium", [*TEXT, "--config.model.channels=16"])
  sizes += ["--config.data.image_size=(8, 8)", "--config.data.channels=16"]
  labels = untrained("digits_dit.py", [*DIT, *sizes])
  monkeypatch.setattr(restored, "open", lambda directory, *, ema: labels)
  with pytest.raises(errors.UserError, match="condition: texts and labels"):
    restored.worse(pathlib.Path("w"), better)


def test_why_samples_in_training_stopped_is_logged(monkeypatch, caplog):
  def draw(params, cond, *, seed, stopped, count):
    del params, seed, count
    stopped("dopri5 stopped at t = 0.4")
    return np.zeros((len(cond), 8, 8, 1))

  monkeypatch.setattr(train.drawing, "build", lambda *args: draw)
  monkeypatch.setattr(train.drawing, "conditions", lambda run, count: [0])
  monkeypatch.setattr(train.drawing, "beside", lambda run, cond: [])
  monkeypatch.setattr(train.drawing, "captions", lambda run, count: [])
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(train.states, "averaged", lambda state: None)
  config = configs.load(f"{CONFIGS}/digits_dit.py", DIT)
  built = types.SimpleNamespace(experiment=config)
  look = train._samples(built, pathlib.Path("run"))
  with caplog.at_level(logging.WARNING):
    look(types.SimpleNamespace(step=7))
  assert "Samples of step 7: dopri5 stopped at t = 0.4" in caplog.text


TEXT = [
  "--config.data.image_size=(8, 8)",
  "--config.data.batch_size=8",
  "--config.data.source=digits",
  "--config.mesh.data=1",
  "--config.mesh.fsdp=-1",
  "--config.sample.steps=2",
  "--config.model.image_size=(8, 8)",
  "--config.model.depth=1",
  "--config.model.heads=1",
  "--config.model.head_size=16",
  "--config.model.text_width=6",
  "--config.model.pooled_width=5",
  "--config.model.dtype=float32",
]


@pytest.mark.slow
def test_a_network_of_texts_is_given_embeddings(array, tmp_path, capsys):
  rng = np.random.default_rng(4)
  texts = {
    "text": rng.standard_normal((2, 3, 6)),
    "pooled": rng.standard_normal((2, 5)),
  }
  negative = {f"negative_{key}": 0.0 * value for key, value in texts.items()}

  def drawn(*words, **arrays):
    np.savez(tmp_path / "texts.npz", **arrays)
    flag = f"--embeddings={tmp_path}/texts.npz"
    return array(flag, *words, config="sd3.py:medium", keys=TEXT)

  found = drawn("--num=4", **texts)
  assert found.shape == (4, 8, 8, 16)
  # Without a negative text, none is one of zeros.
  np.testing.assert_allclose(drawn("--num=4", **texts, **negative), found)
  other = {key: value + 1.0 for key, value in negative.items()}
  assert np.abs(drawn("--num=4", **texts, **other) - found).max() > 1e-3
  for wrong, message in (
    ({"text": texts["text"]}, "must hold 'text' and 'pooled'"),
    ({**texts, "pooled": np.zeros((3, 5))}, "it must be [2, 5]"),
  ):
    assert drawn(**wrong) == 2
    assert message in capsys.readouterr().err
  np.savez(tmp_path / "texts.npz", **texts)
  assert array(f"--embeddings={tmp_path}/texts.npz") == 2
  assert "told labels" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--prompt=four", "--embeddings=a.npz"])
def test_labels_beside_texts_are_refused(drawn, capsys, word):
  assert drawn("--labels=3", word) == 2
  assert "--labels=3: texts were given, too" in capsys.readouterr().err
