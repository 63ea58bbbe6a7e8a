"""Several processes, one job: how they find each other, agree, and end.

jax.distributed does the work; here is when it is started, and what it does not
say: who has not arrived, who runs other code, who is lost. The processes are
found from the environment, in this order:

  FLOWJAX_COORDINATOR, FLOWJAX_PROCESSES, FLOWJAX_PROCESS   as launch/local.sh
  SLURM's srun, TPU slices, Kubernetes, Open MPI            jax's own detection
  none of them                                              one process

FLOWJAX_START_TIMEOUT (300) is how many seconds a process waits for the others,
and FLOWJAX_LOST_TIMEOUT (60) after how many seconds of silence one is lost.
"""

import collections.abc
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import traceback
from typing import Any

import jax
import jaxlib

import flowjax
from flowjax import errors, schema
from flowjax.parallel import arrival, platforms, room
from flowjax.parallel import peers as peers_lib

EXPLICIT = ("FLOWJAX_COORDINATOR", "FLOWJAX_PROCESSES", "FLOWJAX_PROCESS")

# A failed process waits so long for the others to end with it, in seconds.
_LEAVING = peers_lib.GRACE + 3.0
# One that is done waits for those that still write.
_ENDING = 24 * 3600.0

_peers: peers_lib.Peers | None = None
_agreed = _met = 0


def peers() -> peers_lib.Peers | None:
  """Returns the other processes; None where there is but this one."""
  return _peers


def is_first() -> bool:
  """Tells whether this is the process that writes files and prints."""
  return jax.process_index() == 0


@contextlib.contextmanager
def job(flags: dict[str, Any]):
  """Does what is within in all processes of the job, which end together."""
  try:
    start()
    agree("flags", flags)
    yield
    finish()
  except (Exception, KeyboardInterrupt) as error:
    if _peers is not None:
      leave(error)
    raise


def start() -> None:
  """Meets the other processes, if there are any, before a device is touched.

  Raises UserError if they do not all arrive in time, naming those that are
  missing, and if they run other code.
  """
  global _peers
  given = _explicit()
  if given is None and not _is_cluster():
    return
  before = signal.getsignal(signal.SIGTERM)
  lost = _seconds("FLOWJAX_LOST_TIMEOUT", 60)
  arrival.initialize(
    given,
    timeout=_seconds("FLOWJAX_START_TIMEOUT", 300),
    # `Peers` says it first, and more kindly.
    heartbeat_timeout=2 * lost + 10,
  )
  # jax takes SIGTERM as news for itself, and then nothing ends the process.
  signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
  state = arrival.state()
  if state.num_processes == 1:
    return
  _peers = peers_lib.Peers(
    state.client,
    state.process_id,
    state.num_processes,
    timeout=lost,
    host=socket.gethostname(),
  )
  if state.process_id:
    sys.stdout = open(os.devnull, "w")
  logging.info(
    "Process %d of %d, which meet at %s.",
    state.process_id, state.num_processes, state.coordinator_address,
  )  # fmt: skip
  agree(
    "code",
    {
      "flowjax": flowjax.__version__,
      "source": _hash_of_source(),
      "jax": jax.__version__,
      "jaxlib": jaxlib.__version__,
      "python": sys.version.split()[0],
    },
  )


def agree(what: str, values: dict[str, Any]) -> None:
  """Refuses to go on where a process has other values than process 0.

  They are compared by their hash; what differs is then shown. All processes
  raise the same UserError.
  """
  if _peers is None:
    return
  global _agreed
  client, mine = arrival.state().client, _peers.index
  _agreed += 1  # As all come here in the same order, a name for what follows.
  place = f"flowjax/agree/{_agreed}"
  text = json.dumps(values, sort_keys=True, default=str)
  digest = hashlib.sha256(text.encode()).hexdigest()
  client.key_value_set(f"{place}/values/{mine}", text)
  client.key_value_set(f"{place}/hash/{mine}", digest)
  if not _peers.meet(place, _seconds("FLOWJAX_START_TIMEOUT", 300)):
    raise errors.Lost(f"Not all processes came to compare their {what}.")
  found = {
    int(key.rpartition("/")[2]): value
    for key, value in client.key_value_dir_get(f"{place}/hash/")
  }
  others = [p for p in sorted(found) if found[p] != found[0]]
  if not others:
    return
  first, other = (
    json.loads(client.key_value_try_get(f"{place}/values/{p}"))
    for p in (0, others[0])
  )
  rows = schema.difference(first, other, what)
  raise errors.UserError(
    f"Process {', '.join(map(str, others))} differs from process 0 in its "
    f"{what}:\n  "
    + "\n  ".join(rows)
    + f"\n(process 0 -> process {others[0]})."
    " Start all processes with the same command, from the same code."
  )


def meet() -> None:
  """Waits until all processes are here, however long their own work takes.

  Whoever is the first in a collective waits for the others there, and where
  devices meet for the first time not every library has the patience: that of
  CPUs gives up after 30 seconds. So all meet before a program first runs.
  """
  global _met
  if _peers is not None:
    _met += 1
    if not _peers.meet(f"meet/{_met}", _ENDING):
      raise errors.Lost("Not all processes came to where all meet.")


def together(jitted: Any) -> collections.abc.Callable[..., Any]:
  """Returns a jitted function that all processes compile before any runs it.

  Its first program has room in this machine, or room.NoRoom is raised.
  """
  seen: set[Any] = set()

  def call(*arguments: Any) -> Any:
    if _peers is not None or not seen:
      leaves, structure = jax.tree.flatten(arguments)
      kind = structure, *map(jax.typeof, leaves)
      if kind not in seen:
        seen.add(kind)
        room.require(jitted.lower(*arguments).compile())
        meet()
    return jitted(*arguments)

  return call


def finish() -> None:
  """Ends a command that is done, together with the other processes."""
  if _peers is not None:
    _peers.meet("finish", _ENDING)
    _peers.close()


def leave(error: BaseException) -> None:
  """Ends this process, which has failed, and with it the others: says why.

  It does not return, whatever happens: at the usual exit processes wait for
  each other.
  """
  assert _peers is not None
  code = getattr(error, "exit_code", 1)
  try:
    code = _end(_peers, error, code)
  finally:
    os._exit(code)


def _end(peers: peers_lib.Peers, error: BaseException, code: int) -> int:
  """Says why this process ends, to the user and to all; returns its code."""
  known = isinstance(error, errors.KNOWN)
  # What jax raises may be but the echo of another process's end.
  news = None if known else peers.wait_for_end(peers.patience)
  if news is not None:
    code = news["code"]
    if news["kind"] != "lost":  # That was said when it became known.
      _say(news["text"])
  else:
    first = (str(error).splitlines() or [""])[0]
    first = first if known else f"{type(error).__name__}: {first}"
    with contextlib.suppress(Exception):
      peers.tell(kind="failed", code=code, text=first)
    if not known:
      traceback.print_exception(error)
    _say(str(error) if known else first)
  arrival.expect_end(code)
  peers.meet("leave", _LEAVING)
  logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  return code


def _say(text: str) -> None:
  index = arrival.state().process_id
  print(f"flowjax: process {index}: {text}", file=sys.stderr, flush=True)


def _explicit() -> dict[str, Any] | None:
  """Returns what the FLOWJAX_ variables say of the processes, if they do."""
  found = {name: os.environ.get(name) for name in EXPLICIT}
  if not any(found.values()):
    return None
  missing = [name for name, value in found.items() if not value]
  if missing:
    raise errors.UserError(
      f"{' and '.join(missing)} must be set as well: {EXPLICIT[0]}=HOST:PORT "
      "of process 0, how many processes there are, and which this is."
    )
  address, count, index = found.values()
  if not re.fullmatch(r".+:\d+", str(address)):
    raise errors.UserError(f"{EXPLICIT[0]}={address} must be HOST:PORT.")
  for name, value in ((EXPLICIT[1], count), (EXPLICIT[2], index)):
    if not str(value).isdecimal():
      raise errors.UserError(f"{name}={value} must be a number.")
  if int(str(index)) >= int(str(count)):
    raise errors.UserError(
      f"{EXPLICIT[2]}={index} must be below {EXPLICIT[1]}={count}: processes "
      "are counted from 0."
    )
  return {
    "coordinator_address": address,
    "num_processes": int(str(count)),
    "process_id": int(str(index)),
    "cluster_detection_method": "deactivate",
  }


def _is_cluster() -> bool:
  """Tells whether jax would find other processes; no network is asked.

  A shell inside an allocation of SLURM is one process, and no task of a step.
  """
  env = os.environ
  if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
    return int(env.get("SLURM_NTASKS", 1)) > 1
  if "OMPI_COMM_WORLD_SIZE" in env:
    return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
  if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
    return True
  return platforms.guess() == "tpu"


def _seconds(name: str, default: int) -> int:
  text = os.environ.get(name, str(default))
  if not text.isdecimal() or int(text) < 1:
    raise errors.UserError(f"{name}={text} must be a number of seconds.")
  return int(text)


def _hash_of_source() -> str:
  """Returns a hash of all of FlowJAX's own code."""
  folder = pathlib.Path(flowjax.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(str(path.relative_to(folder)).encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]
