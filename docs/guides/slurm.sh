#!/bin/bash
# Fine-tuning that is queued again until it is finished: sbatch slurm.sh --vla_path runs/first --pruner lightvla ...
#SBATCH --job-name=lightvla
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Five minutes before the end SLURM signals this script (B:), which passes it on to the processes of every node. They
# save and end; then the job is queued again, and the same command goes on from the newest checkpoint.
queue_again=0
trap 'queue_again=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # what is started again must not meet the addresses of the try before
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 240 --max-restarts 3 \
    -m lightvla finetune "$@" &
steps=$!

# A trap ends `wait`, so wait until srun is really gone.
wait "$steps"
while kill -0 "$steps" 2>/dev/null; do wait "$steps"; done
wait "$steps"
status=$?
if [ "$queue_again" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
