"""The scripts that start processes, as far as one machine shows them."""

import json
import os
import pathlib
import subprocess
import textwrap
import types

import pytest
import yaml

from flowjax.commands import configs

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
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


def test_a_signal_to_it_is_one_to_all_for_whom_it_waits():
  """And they are not started again: somebody wanted them to stop."""
  code = (
    "trap 'sleep 0.3; echo saved; exit 42' TERM; echo ready; "
    "while :; do sleep 0.05; done"
  )
  words = [LAUNCH / "local.sh", "-r", 5, "--", "bash", "-c", code]
  with subprocess.Popen(
    list(map(str, words)), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  ) as started:  # fmt: skip
    assert started.stdout is not None
    ready = [started.stdout.readline() for _ in range(2)]
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
    started.terminate()
    said, _ = started.communicate(timeout=60)
  assert started.returncode == 42
  assert sorted(said.splitlines()) == ["[0] saved", "[1] saved"]


def test_who_does_not_end_with_the_others_is_ended(tmp_path):
  text = (LAUNCH / "local.sh").read_text()
  quick = tmp_path / "local.sh"
  assert "FLOWJAX_LOST_TIMEOUT + 20" in text
  quick.write_text(text.replace("FLOWJAX_LOST_TIMEOUT + 20", "1"))
  code = "((FLOWJAX_PROCESS)) && exit 3; exec sleep 50"
  done = _run("bash", quick, "--", "bash", "-c", code)
  assert done.returncode == 3


@pytest.mark.slow(1)
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


@pytest.fixture(name="documents", scope="module")
def _documents():
  return list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))


@pytest.fixture(name="jobsets", scope="module")
def _jobsets(documents):
  return [one for one in documents if one["kind"] == "JobSet"]


API = json.loads((HERE / "jobset_fields.json").read_text())
PLAIN = {"str": str, "int": int, "bool": bool, "dict": dict}


def wrong_with(value, kind, where):
  """Returns what the API would not take of a value, each with its place."""
  if kind.startswith("list["):
    if not isinstance(value, list):
      return [f"{where} is no list"]
    pairs = ((v, f"{where}[{i}]") for i, v in enumerate(value))
    inner = kind.removeprefix("list[").removesuffix("]")
    return [wrong for v, at in pairs for wrong in wrong_with(v, inner, at)]
  if kind in PLAIN:
    # A bool is an int to Python.
    fits = isinstance(value, PLAIN[kind]) and (
      kind == "bool" or not isinstance(value, bool)
    )
    return [] if fits else [f"{where}: {value!r} is no {kind}"]
  fields, found = API["types"][kind], []
  for name in API["required"].get(kind, []):
    if name not in value:
      found.append(f"{where} has no {name}")
  for name, inner in value.items():
    at = f"{where}.{name}"
    if name not in fields:
      found.append(f"{at}: there is no such field")
      continue
    found += wrong_with(inner, fields[name], at)
    allowed = API["choices"].get(f"{kind}.{name}")
    given = inner if isinstance(inner, list) else [inner]
    found += [f"{at}: {v!r}" for v in given if allowed and v not in allowed]
  return found


def test_the_manifest_is_what_the_api_takes(documents):
  assert [one["kind"] for one in documents] == [
    "JobSet", "ServiceAccount", "Role", "RoleBinding", "JobSet",
  ]  # fmt: skip
  for one in documents:
    assert wrong_with(one, one["kind"], one["kind"]) == []


@pytest.mark.parametrize(
  "old, new, said",
  [
    ("maxRestarts", "maxRestart", "maxRestart: there is no such field"),
    ("maxRestarts: 100", "maxRestarts: often", "'often' is no int"),
    ("action: FailJobSet", "action: Fail", "action: 'Fail'"),
    ("- name: slice\n", "-\n", "has no name"),
    ("values: [2, 3, 4, 5]", "values: 2", "values is no list"),
  ],
)
def test_what_it_does_not_take_is_said(old, new, said):
  text = (LAUNCH / "gke_jobset.yaml").read_text()
  assert old in text
  first = next(yaml.safe_load_all(text.replace(old, new)))
  (wrong,) = wrong_with(first, "JobSet", "JobSet")
  assert said in wrong


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


class Kubernetes:
  """Stands in for its client, and has what JobSet makes of a manifest."""

  class ApiException(Exception):
    pass

  def __init__(self, jobset):
    name = jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = f"{name}-{replicated['name']}-0"
    labels = {"jobset.sigs.k8s.io/jobset-name": name}
    controller = types.SimpleNamespace(controller=True, kind="Job")
    spec = types.SimpleNamespace(**replicated["template"]["spec"])
    self.asked, space = [], types.SimpleNamespace
    self.job = space(metadata=space(name=job, labels=labels), spec=spec)
    self.pod = space(
      metadata=space(
        name=f"{job}-0",
        labels={**labels, "job-name": job},
        owner_references=[controller],
      ),
      spec=space(subdomain=name),
    )

  def list_namespaced_pod(self, namespace, field_selector):
    self.asked.append(("list", "pods"))
    return types.SimpleNamespace(items=[self.pod])

  def read_namespaced_job(self, name, namespace):
    assert name == self.job.metadata.name
    self.asked.append(("get", "jobs"))
    return self.job


def test_jax_finds_the_machines_with_the_rights_that_they_have(
  documents, jobsets, monkeypatch
):
  clusters = pytest.importorskip("jax._src.clusters.k8s_cluster")
  known = Kubernetes(jobsets[1])
  # A class of its own keeps what the real one found by itself apart.
  own = {
    name: value
    for name, value in vars(clusters.K8sCluster).items()
    if name not in ("__dict__", "__weakref__")
  }
  cluster = type("K8sCluster", (), own)
  cluster._core_api = cluster._batch_api = known
  cluster._ApiException = Kubernetes.ApiException
  monkeypatch.setattr(cluster, "_namespace", classmethod(lambda _: "default"))
  monkeypatch.setattr(clusters.socket, "gethostbyname", lambda name: "10.0.0.1")
  monkeypatch.setenv("HOSTNAME", "flowjax-gpu-machine-0-3")
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
  place = cluster.get_coordinator_address(300, None)
  assert place == "flowjax-gpu-machine-0-0.flowjax-gpu:55527"
  job = known.job.spec
  assert cluster.get_process_count() == job.parallelism == 4
  assert cluster.get_process_id() == 3 and job.completionMode == "Indexed"

  account, role, binding = documents[1:4]
  names = {one["metadata"]["name"] for one in (account, role, binding)}
  pod = job.template["spec"]
  assert names == {pod["serviceAccountName"]} == {binding["roleRef"]["name"]}
  assert [one["name"] for one in binding["subjects"]] == [*names]
  allowed = {
    (verb, resource)
    for rule in role["rules"]
    for verb in rule["verbs"]
    for resource in rule["resources"]
  }
  assert set(known.asked) == allowed


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
