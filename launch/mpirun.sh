#!/usr/bin/env bash
# Llama 3 70B in NF4 on two nodes of 8 GPUs, HSDP, by MPICH's or Intel MPI's mpirun: run this on the first node, in the
# project's folder. It needs ssh without a password and the same paths on all hosts. Open MPI's is, for the same,
#   mpirun -np 16 --host node1:8,node2:8 -x MASTER_ADDR -x MASTER_PORT -x NCCL_SOCKET_IFNAME -x GLOO_SOCKET_IFNAME ...
# launch/README.md says more.
set -euo pipefail
set -a; . launch/network.env; set +a
# Where the ranks meet. With both set, mpi4py is not needed.
export MASTER_ADDR=node1 MASTER_PORT=29500

# mpirun does not start again by itself.
for _ in 1 2 3 4; do
    mpirun -hosts node1,node2 -n 16 -ppn 8 -iface eth0 \
        python launch/train.py --config configs/llama3_70b_math_fsdp2_multinode.json \
        --model.name_or_path /shared/models/Meta-Llama-3-70B \
        --data.train /shared/data/train.jsonl --data.eval /shared/data/eval.jsonl \
        --train.output_dir /shared/runs/llama-70b \
        --train.resume auto --train.ddp_timeout 900 && exit 0
done
exit 1
