"""The arms of pruned_quality.py that prune and tune in rounds: LoSA, and the same rounds with all layers alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sparselora_dist import SparseBaseConfig, SparseLoRAConfig, apply_sparselora
from sparselora_dist.config.run import RunConfig
from sparselora_dist.pruning import losa as rounds
from sparselora_dist.train import run as train


@contextmanager
def alike() -> Iterator[None]:
    """Within it every layer gets the round's mean sparsity and mean rank."""
    with (
        patch.object(rounds, "layer_shares", lambda worth, mean, *_: [mean] * len(worth)),
        patch.object(rounds, "layer_ranks", lambda errors, mean: [round(mean)] * len(errors)),
    ):
        yield


def tuned_in_rounds(config: RunConfig, base: str, output: Path, sequences: int) -> tuple[Any, Any, dict[str, Any]]:
    """Prune and tune by ``config``, to the ``method sparsity`` of ``base``.

    Returns:
        the merged model, the pruned one, and what the last round chose.
    """
    method, sparsity = base.split()
    shutil.rmtree(output, ignore_errors=True)
    asked = rounds.LoSA(
        config=config,
        sparsity=float(sparsity),
        output=output,
        method=method,
        sequences=sequences,
        similar=sequences,
        length=config.data.max_length,
    )
    last = list(rounds.losa(asked, train)["rounds"].values())[-1]
    pruned: Any = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32, trust_remote_code=False)
    model = PeftModel.from_pretrained(model, output / "run" / "adapter").requires_grad_(False)
    apply_sparselora(model, SparseLoRAConfig(enabled=False), sparse_base=SparseBaseConfig())
    chosen = {"layer_sparsity": last["layer_sparsity"], "ranks": last["ranks"]}
    return model.merge_and_unload(), pruned, chosen
