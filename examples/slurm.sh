#!/bin/bash
# A comparison on 4 nodes of 8 GPUs: sbatch examples/slurm.sh. Killed by its time limit, the same command goes on.
#SBATCH --job-name=nmke
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
set -euo pipefail

export OMP_NUM_THREADS=8                # CPUs and threads of each segment: 64 / 8 GPUs
export RAY_AUTH_MODE=token              # only who has the token, in ~/.ray of a home that the nodes share, may give it work
ray get-auth-token --generate > /dev/null

# Every node: a Ray process with its CPUs and GPUs. The first is the head, and this script runs there.
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')
srun --nodes=1 --ntasks=1 -w "${nodes[0]}" \
    ray start --head --node-ip-address="$head" --port=6379 --num-cpus=64 --num-gpus=8 --block &
sleep 20
srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="${nodes[0]}" \
    ray start --address="$head:6379" --num-cpus=64 --num-gpus=8 --block &
sleep 20

# The model is loaded by its name on every node (from its own hub cache); results are written here alone.
nmke compare --model qwen2.5-7b --methods "NMKE,AlphaEdit,MEMIT" --data requests.json --edits 2000 \
    --checkpoints 100,500,1000,2000 --seeds 10 --on "ray:$head:6379" --out results
