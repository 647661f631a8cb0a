#!/usr/bin/env bash
# The part of a job on one node: copies the data if asked, then trains with the other nodes.
# Usage: jobs/node.sh JOB NODES FIRST_NODE
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/settings.sh
job=$1 nodes=$2 first=$3

data=$DATA
if [ -n "$LOCAL_DISK" ]; then
    data=$LOCAL_DISK/$(basename "$DATA")
    mkdir -p "$data"
    (
        flock 9  # jobs that share the disk wait for the first one's copy
        if [ ! -e "$data/.complete" ]; then
            cp -R "$DATA/." "$data"
            touch "$data/.complete"
        fi
    ) 9> "$data/.lock"
fi

# in place of this shell, so that the scheduler's signals reach torchrun
# shellcheck disable=SC2086
exec torchrun --nnodes="$nodes" --nproc_per_node="$PROCESSES" --max_restarts="$MAX_RESTARTS" \
    --rdzv_id="$job" --rdzv_backend=c10d --rdzv_endpoint="$first:$MASTER_PORT" \
    main_pretrain.py --cfg "$CFG" --data-path "$data" --output "$OUTPUT" --tag "$TAG" $FLAGS
