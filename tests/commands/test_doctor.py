"""The doctor sees what is here, and says what is off."""

import json

import jax
import pytest

from flowjax import __main__ as door
from flowjax.commands import doctor
from flowjax.ops import attention
from flowjax.parallel import mesh as meshes
from flowjax.parallel import wires


@pytest.mark.slow
def test_a_sound_machine(tmp_path, capsys):
  words = ["doctor", f"--workdir={tmp_path}", "--mesh=data=2,fsdp=4"]
  words += [f"--json={tmp_path / 'facts.json'}", "--write_size=1MB"]
  words += ["--reduce_size=100KB"]
  slow, doctor.SLOW_DISK = doctor.SLOW_DISK, 1.0
  try:
    assert door.main(words) == 0
  finally:
    doctor.SLOW_DISK = slow
  said = capsys.readouterr().out
  assert "All is well." in said and "8 x cpu (cpu)" in said
  facts = json.loads((tmp_path / "facts.json").read_text())
  assert facts["off"] == [] and facts["versions"]["jax"] == jax.__version__
  assert set(facts["attention"]) == set(attention.BODIES) - {"auto"}
  assert facts["attention"]["xla"] == "works"
  assert facts["attention"]["cudnn"].startswith("no: ")
  assert "NVIDIA" in facts["attention"]["cudnn"]
  rates = facts["all_reduce_bytes_per_second"]
  assert set(rates) == {"data (2)", "fsdp (4)"}
  assert all(rate > 0 for rate in rates.values())
  assert facts["write_bytes_per_second"]["process 0"] > 0
  assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


@pytest.mark.slow
def test_what_is_off_is_told_with_advice(tmp_path, capsys, monkeypatch):
  """A file where a folder is wanted, and an attention that is not finite."""
  (tmp_path / "file").write_text("")

  def broken(q_BTNH, k_BSNH, v_BSNH, *, body):
    return q_BTNH * float("nan")

  monkeypatch.setattr(attention, "attention", broken)
  words = ["doctor", f"--workdir={tmp_path / 'file'}", "--reduce_size=1KB"]
  assert door.main(words) == 2
  said = capsys.readouterr().err
  assert "cannot be written by process 0" in said
  assert "Attention by 'xla' is not finite" in said


@pytest.mark.parametrize(
  ("env", "devices", "advice"),
  [
    ({"NPROC": "2", "JAX_PLATFORMS": "cpu"}, [4], "NPROC=16"),
    ({"NPROC": "16", "SLURM_NTASKS": "4"}, [1], "srun"),
    ({"NPROC": "16"}, [4, 4, 3], "as many of each"),
    ({"NPROC": "16", "JAX_PLATFORMS": "cpu"}, [4, 4], None),
  ],
)
def test_troubles_of_devices(monkeypatch, env, devices, advice):
  monkeypatch.delenv("SLURM_NTASKS", raising=False)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  off = doctor._device_trouble("cpu", devices)
  assert len(off) == (advice is not None)
  assert advice is None or advice in off[0]


def test_a_gpu_that_jax_does_not_see(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "")
  monkeypatch.setattr(
    doctor.glob, "glob", lambda pattern: ["x"] * ("nvidia" in pattern)
  )
  (off,) = doctor._device_trouble("cpu", [1])
  assert "flowjax[gpu]" in off


def test_the_mesh_is_read_as_config_mesh(capsys):
  for text, expected in (
    ("data=-1", meshes.MeshConfig()),
    ("fsdp=4", meshes.MeshConfig(data=1, fsdp=4)),
    ("data=2,fsdp=-1", meshes.MeshConfig(data=2, fsdp=-1)),
  ):
    assert doctor._mesh(text) == expected
  capsys.readouterr()
  for text, said in (
    ("dta=2", "There are: data, fsdp, tensor"),
    ("data=2;fsdp=2", "'data=2;fsdp=2' must be sizes of axes"),
    ("", "must be sizes of axes"),
    ("data=-3", "data = -3: the size of a mesh axis is at least 1"),
  ):
    assert door.main(["doctor", f"--mesh={text}"]) == 2
    assert said in capsys.readouterr().err


def test_where_the_facts_cannot_be_kept_is_said_first(capsys):
  assert door.main(["doctor", "--json=/proc/none/facts.json"]) == 2
  printed = capsys.readouterr()
  assert "--json=/proc/none/facts.json" in printed.err
  assert "devices" not in printed.out


def test_a_wrong_sum_is_seen(monkeypatch):
  mesh = meshes.build(meshes.MeshConfig(data=2, fsdp=4))
  assert wires.all_reduce(mesh, "fsdp", 1000) > 0
  psum = jax.lax.psum
  monkeypatch.setattr(jax.lax, "psum", lambda x, axis: 3 * psum(x, axis))
  with pytest.raises(ValueError, match="all-reduce over fsdp gave"):
    wires.all_reduce(mesh, "fsdp", 1000)
