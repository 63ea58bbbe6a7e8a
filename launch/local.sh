#!/usr/bin/env bash
# Starts a command in several processes on this machine.
#
#   launch/local.sh -n 2 -d 4 -- flowjax train --config=... --workdir=...
#
#   -n N    processes (default 2)
#   -d D    devices of each (default 1): the next D GPUs, or else, and where
#           JAX_PLATFORMS=cpu, D virtual devices of the CPU
#   -r R    start all again, at most R times, where a process was lost (exit
#           code 6, or killed) or preempted (42) (default 0)
#
# Each line has its process before it. When one process ends badly, the others
# are given time to say why and are then ended. The exit code is that of the
# first. Ctrl-C and SIGTERM save and stop all. Needs bash 5.1.
set -u

processes=2 devices=1 restarts=0
while getopts "n:d:r:h" option; do
  case $option in
    n) processes=$OPTARG ;;
    d) devices=$OPTARG ;;
    r) restarts=$OPTARG ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if (($# == 0)); then
  echo "local.sh: which command? launch/local.sh -n 2 -d 4 -- flowjax ..." >&2
  exit 2
fi

export FLOWJAX_PROCESSES=$processes
export FLOWJAX_LOST_TIMEOUT=${FLOWJAX_LOST_TIMEOUT:-20}
# With fewer threads than devices, collectives on a CPU wait for each other.
export NPROC=${NPROC:-16}
grace=$((FLOWJAX_LOST_TIMEOUT + 20))

gpus=0
if [[ ${JAX_PLATFORMS:-} != cpu ]] && compgen -G "/dev/nvidia[0-9]*" >/dev/null
then
  gpus=1
else
  export JAX_PLATFORMS=cpu
  XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
  export XLA_FLAGS
fi

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])'
}

declare -A process_of  # By process id of the system.
asked=0
stop() {
  asked=1
  kill -TERM "${!process_of[@]}" 2>/dev/null
}
trap stop INT TERM

start() {
  FLOWJAX_COORDINATOR=127.0.0.1:$(free_port)
  export FLOWJAX_COORDINATOR
  local p
  for ((p = 0; p < processes; p++)); do
    if ((gpus)); then
      JAX_LOCAL_DEVICE_IDS=$(seq -s, $((p * devices)) $(((p + 1) * devices - 1)))
      export JAX_LOCAL_DEVICE_IDS
    fi
    FLOWJAX_PROCESS=$p PYTHONUNBUFFERED=1 "$@" \
      > >(sed -u "/peer ranks/d;s/^/[$p] /") 2>&1 &
    process_of[$!]=$p
  done
}

# Waits for all; sets `code` to that of the first that ended badly.
watch() {
  local pid ended killer=
  code=0
  while ((${#process_of[@]})); do
    pid=
    wait -n -p pid "${!process_of[@]}"
    ended=$?
    [[ -n ${pid:-} ]] || continue  # It was a signal to this script.
    if ((ended && !code)); then
      code=$ended
      if ((ended > 128)); then
        echo "local.sh: process ${process_of[$pid]} was killed by signal" \
          "$((ended - 128))." >&2
      elif ((ended != 42)); then
        echo "local.sh: process ${process_of[$pid]} ended with exit code" \
          "$ended." >&2
      fi
      unset "process_of[$pid]"
      # It holds no pipe of this script's, whose reader would wait for it.
      (
        trap 'kill $!' TERM
        sleep "$grace" &
        wait $! && kill -KILL "${!process_of[@]}"
      ) >/dev/null 2>&1 &
      killer=$!
    fi
    unset "process_of[$pid]"
  done
  [[ -z $killer ]] || kill "$killer" 2>/dev/null
}

while true; do
  start "$@"
  watch
  ((code == 42 || code == 6 || code > 128)) || break
  ((restarts > 0 && !asked)) || break
  ((restarts--))
  echo "local.sh: all processes start again; $restarts restarts are left." >&2
done
exit "$code"
