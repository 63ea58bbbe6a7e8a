#!/usr/bin/env bash
# Runs a command on every worker of a TPU VM slice.
#
#   ZONE=us-east5-a launch/tpu_pod.sh my-v5p-64 \
#     flowjax train --config=configs/flux_dev.py --workdir=/mnt/shared/runs/flux
#
# The slice is there already (`gcloud compute tpus tpu-vm create`, or a queued
# resource), and so is a disk that all workers share, for the workdir. This
# checkout is copied to the workers and installed, at the first start and
# whenever the slice was made anew. jax finds the workers by itself.
#
# After a preemption, or when a worker was lost, it waits until the slice is
# READY again and starts again, at most RESTARTS times (20); the run goes on from
# its newest checkpoint. A mistake (exit codes 1 to 5) ends it.
set -u

if (($# < 2)) || [[ -z ${ZONE:-} ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
  exit 2
fi
slice=$1
shift
here=$(cd "$(dirname "$0")/.." && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

tpu() { gcloud compute tpus tpu-vm "$1" "$slice" --zone="$ZONE" "${@:2}"; }

wait_until_ready() {
  until [[ $(tpu describe --format='value(state)') == READY ]]; do
    echo "tpu_pod.sh: $slice is not ready; looking again in 30 s." >&2
    sleep 30
  done
}

install() {
  tpu ssh --worker=all --command='test -x flowjax/.venv/bin/flowjax' && return
  gcloud compute tpus tpu-vm scp --recurse --worker=all --zone="$ZONE" \
    "$here" "$slice:flowjax" || return
  tpu ssh --worker=all --command='cd flowjax && python3 -m venv .venv &&
    .venv/bin/pip install --quiet --editable ".[tpu]"'
}

# What the workers ended with is in what they print: ssh does not pass it on.
printf -v words '%q ' "$@"
remote="cd flowjax && export PATH=\$PWD/.venv/bin:\$PATH && $words
  echo \"tpu_pod exit code \$?\""

for ((left = ${RESTARTS:-20}; ; left--)); do
  wait_until_ready
  if install; then
    tpu ssh --worker=all --command="$remote" 2>&1 | tee "$log"
    codes=$(sed -n 's/.*tpu_pod exit code \([0-9]*\).*/\1/p' "$log" | sort -nu)
    [[ $codes == 0 ]] && exit 0
    for code in $codes; do
      ((code >= 1 && code <= 5)) && exit "$code"
    done
  fi
  if ((left == 0)); then
    echo "tpu_pod.sh: no restarts are left." >&2
    exit 6
  fi
  echo "tpu_pod.sh: a worker was lost or preempted; $left restarts left." >&2
  sleep 10
done
