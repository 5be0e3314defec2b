"""Between a launcher and a user's script, as ``coverage run`` stands there.

The scripts run as ``__main__``, unchanged, one for each entry of ``SPARSELORA_RUNS``: ``[name, [script, *arguments]]``. What
every rank saw lies in ``SPARSELORA_SEEN/<rank>.pt``. All of them in one process, for starting one takes longer than a run.
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
    from transformers import Trainer

    from support.trainer_workers import watch

    plain = Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        watcher = watch()
        self.add_callback(watcher)
        result = plain(self, *args, **kwargs)
        frozen = [p for name, p in self.model.named_parameters() if ".mlp." in name and not p.requires_grad]
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        seen.append(
            {
                "losses": [row["loss"] for row in self.state.log_history if "loss" in row],
                "active": [row["sparsity/active"] for row in self.state.log_history if "loss" in row],
                "masks": watcher.masks,
                "engine": self.accelerator.distributed_type.value,
                "stage": plugin.zero_stage if plugin else None,
                "ranks": self.accelerator.num_processes,
                "weights": {"zero3" if hasattr(p, "ds_id") else type(p).__name__ for p in frozen},
                "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()),
            }
        )
        return result

    Trainer.train = train


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    seen: list[dict[str, Any]] = []
    _fsdp_without_a_gpu()
    _watch(seen)
    before = dict(os.environ)
    for name, sys.argv in json.loads(os.environ["SPARSELORA_RUNS"]):
        os.environ.clear()  # Accelerate says there which engine it is, for good.
        os.environ.update(before)
        runpy.run_path(sys.argv[0], run_name="__main__")
        results[name] = seen.pop()
    target = Path(os.environ["SPARSELORA_SEEN"]) / f"{os.environ.get('RANK', '0')}.pt"
    torch.save(results, target.with_suffix(".partial"))
    target.with_suffix(".partial").rename(target)
    # gloo's threads sometimes abort the interpreter's exit after FSDP2; the result file is what counts.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
