#!/usr/bin/env bash
# One meteora command on every host of a Cloud TPU slice, over gcloud ssh; results come to STORE and from there here.
#
#   TPU=my-slice ZONE=us-west4-a STORE=gs://bucket/runs/composites INPUTS=gs://bucket/inputs \
#       scripts/tpu_pod/gcloud.sh evaluate --base inputs/base --bank inputs/bank --gates inputs/gates \
#       --tasks inputs/tasks --composite 3,5,10 --out runs/composites
#
# TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite   makes the slice if there is none of that name (and leaves it there)
# KEEP=1                                          the hosts have this checkout and its environment already
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${STORE:?gs:// folder of the results}"

inputs=${INPUTS:-}

vm() { gcloud compute tpus tpu-vm "$@" --zone "$ZONE"; }
everywhere() { vm ssh "$TPU" --worker all --command "$1"; }

if ! vm describe "$TPU" >/dev/null 2>&1; then
    vm create "$TPU" --accelerator-type "${TYPE:?as v5litepod-16}" --version "${VERSION:?as v2-alpha-tpuv5-lite}"
fi

if [[ -z ${KEEP:-} ]]; then
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format tar.gz --output "$archive" HEAD
    vm scp "$archive" "$TPU:meteora-jax.tar.gz" --worker all
    # The images' own Python may be older than 3.11.
    everywhere 'mkdir -p meteora-jax && tar -xzf meteora-jax.tar.gz -C meteora-jax && cd meteora-jax &&
        python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv &&
        python3 -m uv pip install --quiet --python .venv/bin/python -e ".[eval,tpu]"'
fi

everywhere "cd meteora-jax && STORE=${STORE@Q} INPUTS=${inputs@Q} JAX_PLATFORMS=tpu,cpu scripts/tpu_pod/on_host.sh ${*@Q}"

run=${STORE%/}-run # of a training: log, curves, checkpoints
if gcloud storage ls "$run" >/dev/null 2>&1; then
    gcloud storage rsync --recursive "$run" "runs/$(basename "$run")"
fi
gcloud storage rsync --recursive "$STORE" "runs/$(basename "$STORE")"
echo "results: runs/$(basename "$STORE")"
