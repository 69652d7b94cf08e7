#!/usr/bin/env bash
# One meteora command on every host of a TPU slice in a GKE cluster, as an xpk workload; results come to STORE.
#
#   git archive HEAD | docker build -t IMAGE -f scripts/tpu_pod/Dockerfile - && docker push IMAGE
#   CLUSTER=my-cluster WORKLOAD=composites TYPE=v5litepod-16 IMAGE=... STORE=gs://... INPUTS=gs://... \
#       scripts/tpu_pod/xpk.sh evaluate --base inputs/base ... --out runs/composites
#
# XPK_FLAGS="--project P --zone Z --priority high"   more for `xpk workload create`, split at spaces
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${WORKLOAD:?a new name for this job}" "${TYPE:?as v5litepod-16}"
: "${IMAGE:?made from scripts/tpu_pod/Dockerfile}" "${STORE:?gs:// folder of the results}"
inputs=${INPUTS:-}

read -ra flags <<<"${XPK_FLAGS:-}"
xpk workload create --cluster "$CLUSTER" --workload "$WORKLOAD" --tpu-type "$TYPE" --num-slices 1 \
    --docker-image "$IMAGE" --max-restarts "${RESTARTS:-3}" ${flags[@]+"${flags[@]}"} \
    --command "STORE=${STORE@Q} INPUTS=${inputs@Q} JAX_PLATFORMS=tpu,cpu /meteora-jax/scripts/tpu_pod/on_host.sh ${*@Q}"
echo "when it is done: gcloud storage rsync --recursive $STORE runs/$(basename "$STORE")"
echo "the checkpoints and curves of a training: ${STORE%/}-run"
