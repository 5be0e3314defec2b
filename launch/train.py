"""Fine-tune by one config file.

    python launch/train.py --config configs/single_sparse.json
    torchrun --nproc-per-node 8 launch/train.py --config configs/fsdp2_sparse.json
    deepspeed launch/train.py --config configs/zero3_sparse.json
    mpirun -n 8 python launch/train.py --config configs/zero3_sparse.json
    srun -N 2 --ntasks-per-node 8 python launch/train.py --config configs/llama3_70b_math_fsdp2_multinode.json

Every key of the file can be set from here: ``--train.max_steps 100 --sparse_lora.enabled false``.
"""

import argparse
import os
import sys

from sparselora_dist.process import complain, importing, keep_to_cpu, messages, quiet_bitsandbytes, run_and_leave


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run, as JSON or YAML")
    # Given by the deepspeed launcher, ahead of the other arguments; the ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()

    keep_to_cpu()
    messages()
    quiet_bitsandbytes()

    try:
        with importing():  # Checking the file imports most of it.
            from sparselora_dist.config.run import RunConfig

            config = RunConfig.from_file(arguments.config, overrides)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # All ranks of a host read the same file.
            print(f"error: {error}", file=sys.stderr)
        return 2

    with importing():
        from sparselora_dist.train import closing_words, run

    try:
        summary = run(config)
    except (ValueError, OSError) as error:
        if os.environ.get("SPARSELORA_TRACEBACK"):
            raise
        complain(str(error), "SPARSELORA_TRACEBACK=1 shows where")
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(closing_words(config, summary))
    return 0


if __name__ == "__main__":
    run_and_leave(main)
