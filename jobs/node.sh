#!/usr/bin/env bash
# A part of a job on one node: copies the data to its own disk, or trains with the other nodes.
# Usage: jobs/node.sh copy|train JOB NODES FIRST_NODE
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/settings.sh
part=$1 job=$2 nodes=$3 first=$4

data=$DATA
if [ -n "$LOCAL_DISK" ]; then
    data=$LOCAL_DISK/$(basename "$DATA")
fi
# where the data lie, and the path, size and time of each file: they may change in place
contents() {
    realpath "$DATA"
    find -L "$DATA" -name .synco -prune -o -type f -printf '%P %s %T@\n' | LC_ALL=C sort | sha256sum
}
if [ "$part" = copy ]; then
    mkdir -p "$data"
    (
        flock 9  # jobs that share the disk wait for the first one's copy
        if [ ! -e "$data/.complete" ]; then
            found=$(contents)  # before the copy: what changes meanwhile is noticed by the next job
            cp -R "$DATA/." "$data"
            echo "$found" > "$data/.complete"
        elif [ "$(cat "$data/.complete")" != "$(contents)" ]; then
            echo "$data: a copy of other data than $DATA has now: remove it, or set another" \
                "LOCAL_DISK" >&2
            exit 1
        fi
    ) 9> "$data/.lock"
    exit
fi
if [ -n "$LOCAL_DISK" ] && [ ! -e "$data/.complete" ]; then
    echo "$data: the copy of $DATA is not complete" >&2
    exit 1
fi

# in place of this shell, so that the scheduler's signals reach torchrun
# shellcheck disable=SC2086
exec torchrun --nnodes="$nodes" --nproc_per_node="$PROCESSES" --max_restarts="$MAX_RESTARTS" \
    --rdzv_id="$job" --rdzv_backend=c10d --rdzv_endpoint="$first:$MASTER_PORT" \
    main_pretrain.py --cfg "$CFG" --data-path "$data" --output "$OUTPUT" --tag "$TAG" $FLAGS
