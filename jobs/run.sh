# Runs the parts of a job on its nodes, and after a warning of the wall time starts it again.
# Source it with "job", "nodes", "first", and the functions on_nodes, interrupt and again defined.
# shellcheck shell=bash

# shellcheck disable=SC2154
step="" requeue="" stopped=""

# SIGTERM ends with a checkpoint; torchrun hands it to its processes
stop() {
    stopped=yes
    if [ -n "$step" ]; then interrupt "$step" 2>/dev/null || true; fi
}

run() {
    trap 'requeue=yes; stop' USR1
    trap stop TERM
    local code=0 part starts
    # no node starts to train before all have copied: torchrun waits for a minute only
    for part in ${LOCAL_DISK:+copy} train; do
        for ((starts = 0; starts <= MAX_RESTARTS; starts++)); do
            if [ -n "$stopped" ]; then code=75; break 2; fi
            on_nodes bash jobs/node.sh "$part" "$job" "$nodes" "$first" &
            step=$!
            while kill -0 "$step" 2>/dev/null; do
                code=0
                wait "$step" || code=$?  # ends early at a signal
            done
            # torchrun starts dead processes again, but nobody a launcher that was killed
            if [ "$code" -ne 137 ] || [ -n "$stopped" ]; then break; fi
            echo "a launcher was killed: all start again"
        done
        if [ "$code" -ne 0 ]; then break; fi
    done
    if [ -n "$requeue" ]; then
        echo "the wall time is nearly over: the job is queued again"
        again
        exit 0
    fi
    exit "$code"
}
