"""Between a launcher and a user's script: ``torchrun ... launched.py SCRIPT ARGUMENTS``, as ``coverage run`` stands there.

The script runs as ``__main__``, unchanged, once for each entry of ``SPARSELORA_RUNS``: a name, and arguments that follow
its own. What every rank saw lies in ``SPARSELORA_SEEN/<rank>.pt``. All of them in one process, for starting one takes longer
than the run.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch


def _fsdp_without_a_gpu() -> None:
    """Accelerate turns FSDP on where it found a kind of accelerator, and trains under DDP, in silence, where it found none.

    A name is all that it asks for; the device, the backend and FSDP2 itself stay those of the CPU.
    """
    from accelerate.state import DistributedType, PartialState

    plain = PartialState.__init__

    def named(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        asked = os.environ.get("ACCELERATE_USE_FSDP") == "true" or "--fsdp" in sys.argv
        if asked and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = named


def _watch(seen: list[dict[str, Any]]) -> None:
    """Every ``Trainer.train`` leaves its log, the masks of its steps, and who held the weights how."""
    from transformers import Trainer, TrainerCallback

    from sparselora_dist import selection

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.masks: list[dict] = []

        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            self.masks.append(selection(model))

    plain = Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = Watch()
        self.add_callback(watch)
        result = plain(self, *args, **kwargs)
        frozen = [p for name, p in self.model.named_parameters() if ".mlp." in name and not p.requires_grad]
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        seen.append(
            {
                "log": self.state.log_history,
                "masks": watch.masks,
                "engine": str(self.accelerator.distributed_type),
                "stage": plugin.zero_stage if plugin else None,
                "ranks": self.accelerator.num_processes,
                "sharded": {type(p).__name__ if not hasattr(p, "ds_id") else "zero3" for p in frozen},
                "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()),
            }
        )
        return result

    Trainer.train = train


def main() -> None:
    script, *arguments = sys.argv[1:]
    runs = json.loads(os.environ["SPARSELORA_RUNS"])
    results: dict[str, dict[str, Any]] = {}
    seen: list[dict[str, Any]] = []
    _fsdp_without_a_gpu()
    _watch(seen)
    for name, its_script, more in runs:
        sys.argv = [its_script or script, *(arguments + more if not its_script else more)]
        if os.environ.get("TRY"):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                results[name] = seen.pop()
            except Exception as error:
                import traceback; traceback.print_exc(); results[name] = repr(error)
            continue
        runpy.run_path(sys.argv[0], run_name="__main__")
        results[name] = seen.pop()
    rank = os.environ.get("RANK", "0")
    target = Path(os.environ["SPARSELORA_SEEN"]) / f"{rank}.pt"
    torch.save(results, target.with_suffix(".partial"))
    target.with_suffix(".partial").rename(target)
    # gloo's threads sometimes abort the interpreter's exit after FSDP2; the result file is what counts.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
