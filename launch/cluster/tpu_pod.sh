#!/bin/bash
# Trains on every host of a Cloud TPU pod slice: docs/clusters.md.
#
#     launch/cluster/tpu_pod.sh NAME ZONE --config=configs/grpo.py:paper --workdir=/mnt/shared/paper
#
# The checkout lies in ~/apr_jax of every host, with its environment in .venv (docs/clusters.md says how it gets there).
set -euo pipefail

if (($# < 2)); then
    echo "usage: $0 NAME ZONE [flags of launch/train.py]" >&2
    exit 2
fi
name="$1" zone="$2"
shift 2
printf -v flags '%q ' "$@"

# The same command on all hosts; each finds its place in the pod by itself.
exec gcloud compute tpus tpu-vm ssh "${name}" --zone="${zone}" --worker=all \
    --command="cd apr_jax && APR_HOSTS=auto PYTHONPATH=. exec .venv/bin/python launch/train.py ${flags}"
