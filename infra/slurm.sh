#!/usr/bin/env bash
# A Ray cluster over this allocation, one gradine run on it, and both end with the allocation. From the checkout:
#   sbatch --nodes=2 infra/slurm.sh mine.yaml runs=/shared/runs data.shards=/shared/shards
# The same command again resumes. The checkout, the Python of $PATH and the run's folders are on a disk all nodes see.
#SBATCH --job-name=gradine
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
# --exclusive: a node with two Rays needs ports of its own for each. --signal: two minutes for a checkpoint at the end.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"  # where sbatch was called: Slurm runs a copy of this file from elsewhere

folder=$PWD/slurm/$SLURM_JOB_ID
(umask 077
 mkdir -p "$folder"
 od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$folder/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
export GRADINE_TEMP_DIR=${TMPDIR:-/tmp}/gradine-$SLURM_JOB_ID  # on each node's own disk
export GRADINE_PORT=$((20000 + SLURM_JOB_ID % 20000))
export GRADINE_CPUS=${SLURM_CPUS_ON_NODE:-} GRADINE_GPUS=${SLURM_GPUS_ON_NODE:-}  # all nodes alike

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export GRADINE_HEAD=${nodes[0]}:$GRADINE_PORT  # this script runs there
# Bound to no core: Ray's workers share all of them. No MPI: from its PMI_SIZE a lone worker would take itself for many.
step=(srun --overlap --ntasks-per-node=1 --cpu-bind=none --mpi=none)

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
"${step[@]}" --nodes=1 --nodelist="${nodes[0]}" infra/head.sh >> "$folder/head.log" 2>&1 &
if ((${#nodes[@]} > 1)); then
  "${step[@]}" --nodes=$((${#nodes[@]} - 1)) --exclude="${nodes[0]}" infra/worker.sh >> "$folder/workers.log" 2>&1 &
fi

export RAY_ADDRESS=$GRADINE_HEAD RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
head_answers="exec 3<>/dev/tcp/${nodes[0]}/$GRADINE_PORT"
timeout 300 bash -c "until $head_answers; do sleep 1; done" 2>/dev/null ||
  { echo "slurm.sh: no head at $RAY_ADDRESS after 300 s: see $folder/head.log" >&2; exit 3; }
timeout 300 python - "${#nodes[@]}" << 'PYTHON' || { echo "slurm.sh: not all nodes joined: see $folder" >&2; exit 3; }
import sys, time, ray
ray.init(log_to_driver=False, configure_logging=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(1)
PYTHON

python -m gradine.pipeline run "$@" &
run=$!
asked=
trap 'asked=1; trap "" TERM; kill -TERM $run' TERM  # Slurm's, two minutes before the end, or at `scancel --batch`
wait "$run" && code=0 || code=$?
[[ -z $asked ]] || { wait "$run" && code=0 || code=$?; }  # the signal had ended the first wait, not the run
exit "$code"
