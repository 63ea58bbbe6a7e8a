"""libtpu is told what it would ask for, but where a TPU is."""

import os

from flowjax.commands import quiet


def test_only_without_a_tpu(monkeypatch, tmp_path):
  for name in quiet.TOLD:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(quiet, "DEVICES", (str(tmp_path / "accel*"),))
  (tmp_path / "accel0").touch()
  quiet.without_tpu()
  assert not set(quiet.TOLD) & set(os.environ)
  (tmp_path / "accel0").unlink()
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
  # Remembered first, so that it is gone after the test.
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "")
  monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
  quiet.without_tpu()
  assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
  assert os.environ["TPU_ACCELERATOR_TYPE"]
