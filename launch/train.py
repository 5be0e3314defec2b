"""Fine-tune by one config file.

    python launch/train.py --config configs/single_sparse.json
    torchrun --nproc-per-node 8 launch/train.py --config configs/fsdp2_sparse.json
    deepspeed launch/train.py --config configs/zero3_sparse.json
    mpirun -n 8 python launch/train.py --config configs/zero3_sparse.json

Every key of the file can be set from here: ``--train.max_steps 100 --sparse_lora.enabled false``.
"""

import argparse
import logging
import os
import sys
import traceback


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run, as JSON or YAML")
    # Given by the deepspeed launcher, ahead of the other arguments; the ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparselora_dist").setLevel(logging.INFO)
    # PEFT imports bitsandbytes, which complains of an optional CPU kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)

    from sparselora_dist.config.run import RunConfig

    try:
        config = RunConfig.from_file(arguments.config, overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from sparselora_dist.train import run

    try:
        run(config)
    except (ValueError, OSError) as error:
        if os.environ.get("SPARSELORA_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}\n(rank {rank}; SPARSELORA_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    return 0


def leave(status: int) -> None:
    """End one of several ranks at once.

    After success everything is saved and the process group is closed, but gloo's threads abort the interpreter's own exit in
    about one FSDP2 run of ten, which would report a finished job as failed. After a failure the interpreter's exit could
    wait for ranks that are stuck.
    """
    if status == 0 and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        status = main()
    except BaseException as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        if isinstance(error, SystemExit):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        print(f"(rank {os.environ.get('RANK', '0')} failed)", file=sys.stderr)
        leave(1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(status)
    sys.exit(status)
