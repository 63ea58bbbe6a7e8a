"""The scripts that start processes, as far as one machine shows them."""

import os
import pathlib
import subprocess
import textwrap

import pytest
import yaml

from flowjax.commands import configs

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_pod.sh")


def _run(*words, **env):
  return subprocess.run(
    list(map(str, words)), env={**os.environ, **env}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
  )  # fmt: skip


def _local(code, *flags, **env):
  words = [LAUNCH / "local.sh", *flags, "--", "bash", "-c", code]
  return _run(*words, FLOWJAX_LOST_TIMEOUT="1", **env)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_is_one_of_bash(name):
  done = _run("bash", "-n", LAUNCH / name)
  assert done.returncode == 0, done.stdout
  text = (LAUNCH / name).read_text()
  assert "flowjax train" in text.split("set -u")[0]


def test_each_process_is_told_which_it_is():
  code = 'echo "$FLOWJAX_PROCESS/$FLOWJAX_PROCESSES $NPROC $XLA_FLAGS"'
  done = _local(
    code, "-n", "3", "-d", "2", JAX_PLATFORMS="cpu", XLA_FLAGS="--a"
  )
  assert done.returncode == 0
  assert sorted(done.stdout.splitlines()) == [
    f"[{p}] {p}/3 16 --a --xla_force_host_platform_device_count=2"
    for p in range(3)
  ]


def test_the_first_bad_end_is_told_and_is_that_of_all():
  done = _local("((FLOWJAX_PROCESS)) && exit 3; sleep 1; exit 1")
  assert done.returncode == 3
  assert "process 1 ended with exit code 3" in done.stdout
  done = _local("((FLOWJAX_PROCESS)) && kill -9 $$; sleep 1; exit 6")
  assert done.returncode == 128 + 9
  assert "process 1 was killed by signal 9" in done.stdout


def test_42_is_passed_on():
  assert _local("exit 42").returncode == 42


def test_who_does_not_end_with_the_others_is_ended(tmp_path):
  text = (LAUNCH / "local.sh").read_text()
  quick = tmp_path / "local.sh"
  assert "FLOWJAX_LOST_TIMEOUT + 20" in text
  quick.write_text(text.replace("FLOWJAX_LOST_TIMEOUT + 20", "1"))
  code = "((FLOWJAX_PROCESS)) && exit 3; exec sleep 50"
  done = _run("bash", quick, "--", "bash", "-c", code)
  assert done.returncode == 3


def test_restarts_are_for_what_passes(tmp_path):
  """The third life succeeds; a mistake has no second one."""
  code = (
    f'echo x >> {tmp_path}/$1.$FLOWJAX_PROCESS; n=$(wc -l < '
    f'{tmp_path}/$1.$FLOWJAX_PROCESS); ((n == 3)) || exit $1'
  )  # fmt: skip
  for kind, lives in ((42, 3), (6, 3), (2, 1)):
    words = [LAUNCH / "local.sh", "-r", 5, "--", "bash", "-c", code, "x", kind]
    done = _run(*words)
    assert done.returncode == (0 if lives == 3 else kind)
    assert len((tmp_path / f"{kind}.0").read_text().split()) == lives


GCLOUD = """
  #!/usr/bin/env bash
  echo "$@" >> {log}
  case "$*" in
    *describe*) echo READY ;;
    *exit*code*)
      n=$(grep -c "exit code" {log})
      echo "tpu_pod exit code $(cut -d, -f$n <<< {codes})" ;;
  esac
"""


@pytest.mark.parametrize(
  ("codes", "ends", "lives"), [("0", 0, 1), ("42,6,0", 0, 3), ("6,3", 3, 2)]
)
def test_a_tpu_slice_starts_again_unless_it_was_a_mistake(
  tmp_path, codes, ends, lives
):
  log, gcloud = tmp_path / "log", tmp_path / "gcloud"
  script = textwrap.dedent(GCLOUD).strip().format(log=log, codes=codes)
  gcloud.write_text(script)
  gcloud.chmod(0o755)
  (tmp_path / "sleep").write_text("#!/bin/sh\n")
  (tmp_path / "sleep").chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  words = [LAUNCH / "tpu_pod.sh", "my-slice", "flowjax", "train", "--a=b c"]
  done = _run(*words, ZONE="z", PATH=path)
  assert done.returncode == ends, done.stdout
  runs = [line for line in log.read_text().splitlines() if "b\\ c" in line]
  assert len(runs) == lives
  assert all("--worker=all" in run and "my-slice" in run for run in runs)


@pytest.fixture(name="jobsets", scope="module")
def _jobsets():
  return list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))


def test_the_manifest_holds_two_job_sets(jobsets):
  assert len(jobsets) == 2
  for jobset in jobsets:
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    # What passes is started again, and a mistake is not.
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"]
    (mistake,) = job["podFailurePolicy"]["rules"]
    assert mistake["onExitCodes"]["values"] == [2, 3, 4, 5]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert container["name"] == mistake["onExitCodes"]["containerName"]
    assert container["command"][:2] == ["flowjax", "train"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_sizes_of_a_slice_fit(jobsets):
  (slices,) = jobsets[0]["spec"]["replicatedJobs"]
  pod = slices["template"]["spec"]["template"]["spec"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  a, b, c = map(int, topology.split("x"))
  chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert slices["template"]["spec"]["parallelism"] * chips == a * b * c


def test_each_machine_is_told_which_it_is(jobsets):
  spec = jobsets[1]["spec"]
  (machines,) = spec["replicatedJobs"]
  assert spec["coordinator"]["replicatedJob"] == machines["name"]
  job = machines["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  env = {entry["name"]: entry for entry in container["env"]}
  assert env["FLOWJAX_PROCESSES"]["value"] == str(job["parallelism"])
  assert env["FLOWJAX_COORDINATOR"]["value"].startswith("$(COORDINATOR):")
  fields = [
    env[name]["valueFrom"]["fieldRef"]["fieldPath"]
    for name in ("COORDINATOR", "FLOWJAX_PROCESS")
  ]
  assert "jobset.sigs.k8s.io/coordinator" in fields[0]
  assert "job-completion-index" in fields[1]


def test_the_commands_of_the_manifest_fit_its_devices(jobsets):
  kinds = ("google.com/tpu", "nvidia.com/gpu")
  for jobset, slices in zip(jobsets, (2, 1), strict=True):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    (each,) = (limits[kind] for kind in kinds if kind in limits)
    count = replicated["replicas"] * job["completions"] * each
    _, _, path, _, *overrides = container["command"]
    config = configs.load(str(ROOT / path.removeprefix("--config=")), overrides)
    data, fsdp, *_ = config.mesh.shape(count, slices)
    assert data * fsdp == count
    assert config.data.batch_size % count == 0
