"""One model through every engine: losses, masks, gradients and parameters of some steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.engines import Engine
from sparselora_dist.io.load import load_base
from sparselora_dist.sharding.parameters import is_zero3

from .engine_parts import SPARSE, close, make_engine, run_config, train_step
from .models import ALL_LINEAR, ATTENTION, FUSED, batch, tiny_base, tiny_lora
from .sharding_workers import held

STEPS = 4
# name: (tiny_lora's arguments, sparse_lora's, use_reentrant or None)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool | None]] = {
    "llama": ({}, {}, None),
    "qwen2": ({"family": "qwen2"}, {}, None),
    "qwen3": ({"family": "qwen3"}, {}, None),
    "reentrant": ({}, {}, True),
    "non-reentrant": ({}, {}, False),
    "all linear": ({"targets": ALL_LINEAR}, {}, None),
    "all linear, lora_branch dense": ({"targets": ALL_LINEAR}, {"lora_branch": "dense"}, None),
    "phi3, all linear": ({"family": "phi3", "targets": FUSED["phi3"]}, {}, None),
    "gpt_neox, all linear, non-reentrant": ({"family": "gpt_neox", "targets": FUSED["gpt_neox"]}, {}, False),
    "a rank without labels": ({"targets": ALL_LINEAR}, {}, None),
    "a rank without labels, non-reentrant": ({"targets": ALL_LINEAR}, {}, False),
    "loss in chunks": ({}, {}, None),
    "loss in chunks, tied, reentrant": ({"family": "qwen3", "tie_word_embeddings": True}, {}, True),
    "loss in chunks, a rank without labels": ({"targets": ALL_LINEAR}, {}, False),
}
IN_CHUNKS = [case for case in CASES if "in chunks" in case]
ON_FOUR = ("llama", "all linear", "non-reentrant")


def follow(engine: Engine, model: Any, labelled: int = 1) -> dict[str, Any]:
    """STEPS optimizer steps: losses, masks, gradient norms, first gradients (from Adam's mean), parameters.

    Every ``labelled``-th row has labels.
    """
    seen: dict[str, Any] = {"loss": [], "norm": [], "masks": [], "parameters": [engine.full_parameters()]}
    for step in range(STEPS):
        inputs = batch(4, 24, seed=step)
        inputs["labels"][[row for row in range(4) if row % labelled]] = -100
        loss, norm = train_step(engine, inputs)
        seen["loss"].append(loss)
        seen["norm"].append(norm)
        seen["masks"].append(selection(model))
        seen["parameters"].append(engine.full_parameters())
        if step == 0:
            moments, _ = engine.full_moments()
            seen["gradients"] = {k: 10 * v for k, v in moments.items() if k.endswith(".exp_avg")}
    return seen


def agreement_case(name: str, case: str, **train: Any) -> dict[str, Any]:
    shape, sparse, reentrant = CASES[case]
    engine = make_engine(run_config(name, **train))
    model = apply_sparselora(tiny_lora(**shape), SparseLoRAConfig.from_dict(SPARSE | sparse))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    engine.prepare(model)
    find_state(model).context.chunk_loss = case in IN_CHUNKS
    labelled = 2 if "without labels" in case else 1
    seen = follow(engine, model, labelled)
    if case in IN_CHUNKS:
        seen["evaluated"] = evaluated(engine, model, labelled)
    close(engine)
    return seen


def evaluated(engine: Engine, model: Any, labelled: int) -> list[float]:
    """Loss, right predictions and labels of a batch whose rows are dealt to the ranks."""
    inputs = batch(4, 24, seed=9)
    inputs["labels"][[row for row in range(4) if row % labelled]] = -100
    mine = {name: t[engine.ranks.rank :: engine.ranks.world_size] for name, t in inputs.items()}
    find_state(model).context.evaluating = True
    engine.model.eval()
    with torch.no_grad():
        scores = engine.model(**mine, use_cache=False).logits
    return engine.all_sum(*scores.sum(0).tolist(), len(scores))


def loaded_partitioned(folder: str) -> dict[str, Any]:
    """The case "llama" with the base model streamed into partitions, as a run does it."""
    config = run_config("zero3", folder=folder)
    if dist.get_rank() == 0:
        tiny_base().save_pretrained(folder)
    dist.barrier()
    engine = make_engine(config)
    base = load_base(config.model, config.quantization, engine.placement()).model
    partitioned = all(is_zero3(p) for p in base.parameters())
    whole = apply_sparselora(tiny_lora(), SparseLoRAConfig.from_dict(SPARSE))
    adapters = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")).train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters.keys() == trainable.keys()
    for name, p in trainable.items():
        p.data.copy_(adapters[name])
    apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE))
    sparse_whole = [name for name, p in model.named_parameters() if not p.requires_grad and not is_zero3(p)]
    engine.prepare(model)
    seen = {"partitioned": partitioned, "not partitioned": sparse_whole, "run": follow(engine, model)}
    seen["held"], seen["names"] = held(model), list(adapters)
    close(engine)
    return seen
