#!/bin/bash
# Made by launch.slurm; edit it and submit it again with `sbatch` as you like. Command that made it:
#   @command
@sbatch
set -uo pipefail

export PYTHON=@python
export PYTHONUNBUFFERED=1
@environment

# The code and the configuration of the submission, whatever happens to the checkout in the meantime, and whatever modules
# or other variables put before it.
frozen=@frozen
export PYTHONPATH="$frozen/code${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1

# The first node of the job is where all meet; its address, where its name says nothing.
address_of() {
  getent hosts "$1" > /dev/null && echo "$1" || scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}
export -f address_of
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES
export HEAD="$(address_of "$first"):$((20000 + SLURM_JOB_ID % 20000))"
# Who knows it can make the nodes execute code: new at each start, handed on in the environment alone, printed nowhere.
JOB=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') && [[ ${#JOB} == 32 ]] || exit 1
export JOB
export PROCESSES=@processes
export RESTARTS=@restarts
echo "== job $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, $(date --iso-8601=seconds)"

# Near the time limit this script alone is told (--signal=B:USR1), and asks the training processes to save and leave: more
# than once, since one that has just begun does not hear yet. Before pre-emption Slurm tells them itself.
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
  # A signal ends the wait, but not what is waited for.
  wait "$job_step"
  code=$?
  if kill -0 "$job_step" 2> /dev/null; then code=; fi
done

if [[ -n $asking ]]; then kill "$asking" 2> /dev/null; fi

# Complete, to be continued, or in vain? This decides, and asks Slurm to queue the job again.
exec "$PYTHON" -m launch.restarts end "$frozen" "$code"
