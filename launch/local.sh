#!/usr/bin/env bash
# Several processes on this machine, as if each were a host: a preview of a cluster, or one process for each GPU.
#
#   launch/local.sh PROCESSES --config FILE [flags of flaxkd.train]
#
# Ctrl-C and SIGTERM go to all of them. The exit status is that of the first process that failed, or 0.
set -u

processes=${1:?"usage: launch/local.sh PROCESSES --config FILE [flags of flaxkd.train]"}
shift
address=127.0.0.1:${PORT:-$((20000 + RANDOM % 10000))}
pids=()

trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

for ((i = 0; i < processes; i++)); do
    if command -v nvidia-smi >/dev/null; then
        export JAX_LOCAL_DEVICE_IDS=$i # else each takes all
    fi
    python -m flaxkd.train \
        --coordinator_address="$address" --num_processes="$processes" --process_id="$i" "$@" &
    pids+=($!)
done

status=0
for ((i = 0; i < processes; i++)); do
    while :; do # a signal ends `wait` early
        wait "${pids[i]}"
        code=$?
        kill -0 "${pids[i]}" 2>/dev/null || break
    done
    if ((code)); then
        echo "launch/local.sh: process $i of $processes ended with status $code" >&2
        ((status)) || status=$code
    fi
done
exit "$status"
