#!/usr/bin/env bash
# Llama 3 70B in NF4 on two nodes of 8 GPUs, HSDP: run this on both nodes, in the project's folder. launch/README.md says more.
set -euo pipefail
set -a; . launch/network.env; set +a

# One after another: a node that fails takes its ranks away, and all start again from the newest whole checkpoint.
exec torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id llama-70b --rdzv-endpoint node1:29400 \
    launch/train.py --config configs/llama3_70b_math_fsdp2_multinode.json \
    --model.name_or_path /shared/models/Meta-Llama-3-70B \
    --data.train /shared/data/train.jsonl --data.eval /shared/data/eval.jsonl \
    --train.output_dir /shared/runs/llama-70b \
    --train.resume auto --train.ddp_timeout 900
