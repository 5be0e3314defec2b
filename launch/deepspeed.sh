#!/usr/bin/env bash
# Llama 3 70B in NF4 on two nodes of 8 GPUs, ZeRO-3 with hpZ: run this on the first node, in the project's folder. It needs
# pdsh, ssh without a password to every host of launch/hostfile, and the same paths there. launch/README.md says more.
set -euo pipefail
export DS_ENV_FILE=launch/network.env

# DeepSpeed's launcher does not start again by itself.
for _ in 1 2 3 4; do
    deepspeed --hostfile launch/hostfile --master_addr node1 --master_port 29500 \
        launch/train.py --config configs/llama3_70b_math_zero3_multinode.json \
        --model.name_or_path /shared/models/Meta-Llama-3-70B \
        --data.train /shared/data/train.jsonl --data.eval /shared/data/eval.jsonl \
        --train.output_dir /shared/runs/llama-70b \
        --train.resume auto --train.ddp_timeout 900 && exit 0
done
exit 1
