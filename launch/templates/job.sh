#!/bin/bash
# Written by launch.slurm. You may edit it and submit it again with `sbatch`. Command:
#   @command
@sbatch
set -uo pipefail

export PYTHON=@python
export PYTHONUNBUFFERED=1
@environment

# Code and configuration as they were at submission. They come first on the path, before entries that modules added.
frozen=@frozen
export PYTHONPATH="$frozen/code${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1

# The rendezvous is on the first node of the job. Use its address if its host name does not resolve.
address_of() {
  getent hosts "$1" > /dev/null && echo "$1" || scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}
export -f address_of
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES
export HEAD="$(address_of "$first"):$((20000 + SLURM_JOB_ID % 20000))"
# A secret: processes that have it can run code on the nodes. It is new at each start, passed in the environment only, and
# never printed.
JOB=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') && [[ ${#JOB} == 32 ]] || exit 1
export JOB
export PROCESSES=@processes
export RESTARTS=@restarts
echo "== job $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, $(date --iso-8601=seconds)"

# Near the time limit Slurm signals only this script (--signal=B:USR1), which then signals the training processes to save and
# exit. It repeats the signal, because a process that has just started has no handler yet. Before a pre-emption Slurm signals
# the processes itself.
asking=
ask() {
  while true; do
    scancel --signal=USR1 "$SLURM_JOB_ID"
    sleep 5
  done
}
trap 'echo "== time limit is near"; ask & asking=$!' USR1
trap 'echo "== asked to stop"' TERM

"$PYTHON" -m launch.restarts begin "$frozen" || exit 1
srun --export=ALL --ntasks-per-node=1 --wait=120 @container bash -c '
  trap "" USR1
  export NODE_RANK=$SLURM_NODEID ADDRESS=$(address_of "$SLURMD_NODENAME")
  exec bash "$0/code/launch/torchrun" --config-dir "$0" --config-name frozen' "$frozen" &
job_step=$!
code=
until [[ -n $code ]]; do
  # A signal interrupts the wait, but does not end the job step.
  wait "$job_step"
  code=$?
  if kill -0 "$job_step" 2> /dev/null; then code=; fi
done

if [[ -n $asking ]]; then kill "$asking" 2> /dev/null; fi

# Record how this attempt ended, and requeue the job if it is incomplete and a restart can help.
exec "$PYTHON" -m launch.restarts end "$frozen" "$code"
