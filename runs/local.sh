#!/usr/bin/env bash
# One machine: as many processes as asked for, restarted from the last checkpoint if one dies.
#
#   runs/local.sh 4 --data books/ --ep 2 --tp 2 --out runs/four
#
# Ctrl-C or SIGTERM: every process finishes its step, one checkpoint is saved, and the same command goes on from it.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES [options of moesaic train]" >&2
  exit 2
fi
processes=$1
shift

# Time to save before torchrun kills what has not ended; its own default is 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

out=runs/latest
for ((i = 1; i <= $#; i++)); do
  if [[ ${!i} == --out ]]; then
    next=$((i + 1))
    out=${!next:?--out needs a folder}
  elif [[ ${!i} == --out=* ]]; then
    out=${!i#--out=}
  fi
done
resume=()
if [[ -d $out/checkpoints && " $* " != *" --resume "* ]]; then
  resume=(--resume)
fi

# exec: signals reach torchrun, which passes them on. The address: torchrun would wait for ever on a machine whose name does not
# resolve.
exec torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node="$processes" --max-restarts="${MAX_RESTARTS:-3}" \
  -m moesaic train "$@" ${resume[@]+"${resume[@]}"}
