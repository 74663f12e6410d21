#!/usr/bin/env bash
# Runs on all workers of a TPU VM slice, from your own machine, with gcloud. NAME and ZONE are those of the slice.
#
#   launch/tpu_vm.sh setup NAME ZONE SERVER:/SHARE              copies flaxkd, installs it, mounts the shared folder
#   launch/tpu_vm.sh train NAME ZONE --config FILE [flags of flaxkd.train]
#   launch/tpu_vm.sh watch NAME ZONE                            the log of worker 0; Ctrl-C leaves the run alone
#   launch/tpu_vm.sh stop NAME ZONE                             saves and ends; `train` with the same flags resumes
#
# The share is at /mnt/flaxkd, and runs/ is a folder of it.
set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

(($# >= 3)) || usage
action=$1 name=$2 zone=$3
shift 3

on() { # on WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

case $action in
setup)
    (($# == 1)) || usage
    here=$(cd "$(dirname "$0")/.." && pwd)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$here" archive --format=tar.gz --prefix=flaxkd/ --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:flaxkd.tar.gz" --zone="$zone" --worker=all
    on all "set -e
        sudo apt-get install --yes --quiet nfs-common curl
        sudo mkdir -p /mnt/flaxkd
        mountpoint -q /mnt/flaxkd || sudo mount -t nfs $(printf %q "$1") /mnt/flaxkd
        sudo chmod a+rwx /mnt/flaxkd
        tar -xzf flaxkd.tar.gz
        command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
        [ -d venv ] || ~/.local/bin/uv venv --quiet --seed --python 3.12 venv
        venv/bin/pip install --quiet --editable 'flaxkd[tpu]'"
    ;;
train)
    (($#)) || usage
    flags=$(printf ' %q' "$@")
    # `nohup`: the session ends before the training does. One cache for all: a picture is encoded once.
    on all "cd flaxkd && mkdir -p /mnt/flaxkd/runs && ln -sfn /mnt/flaxkd/runs runs &&
        FLAXKD_CACHE=/mnt/flaxkd/cache nohup ../venv/bin/python -m flaxkd.train --distributed$flags \
            > ../flaxkd.log 2>&1 < /dev/null &"
    ;;
watch)
    on 0 "tail -n 50 -F flaxkd.log"
    ;;
stop)
    on all "pkill -TERM -f '[f]laxkd.train' || echo 'nothing is running here'"
    ;;
*)
    usage
    ;;
esac
