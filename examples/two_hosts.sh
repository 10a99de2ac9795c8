#!/usr/bin/env bash
# One run on two hosts. Here both are this machine, over the loopback; on real hosts run the one line on each,
# with HOST 0 and 1, the first host's address in ADDRESS, and a port that its firewall lets through.
#
#   examples/two_hosts.sh DATA [more flags of rtdetr train]
#
# The dataset must be at the same path on both. The run's folder is written on the first host alone; each process
# takes the GPU of its local rank, or the CPU where there is none.
set -euo pipefail

DATA="${1:?is missing; usage: examples/two_hosts.sh DATA [more flags of rtdetr train]}"
shift
ADDRESS="${ADDRESS:-127.0.0.1}"
PORT="${PORT:-29500}"
PROCESSES="${PROCESSES:-1}" # on each host: its GPUs

host() {
  torchrun --nnodes 2 --node-rank "$1" --nproc-per-node "$PROCESSES" --master-addr "$ADDRESS" --master-port "$PORT" \
    -m rtdetr_cli train --data "$DATA" "${@:2}"
}

host 1 "$@" &
second=$!
trap 'kill "$second" 2>/dev/null || true' EXIT
host 0 "$@"
wait "$second"
