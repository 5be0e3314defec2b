"""What the ranks of ``tests/engines/test_packing.py`` run: the same steps padded and packed, in one process start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.data import GlobalBatchSampler, TokenDataset
from sparselora_dist.layers.packed_attention import use_packed_attention
from sparselora_dist.train.evaluate import evaluate
from sparselora_dist.train.feed import Feed

from .engine_parts import SPARSE, close, make_engine, run_config
from .engine_parts import world as ranks_here
from .models import ALL_LINEAR, tiny_lora

STEPS, ROWS, GLOBAL_BATCH, MAX_LENGTH = 3, 21, 8, 24
# name: (packed, budget over all ranks, accumulation of the padded run, sparse)
CASES: dict[str, tuple[bool, int, int, bool]] = {
    "padded, sparse": (False, 0, 1, True),
    "packed, sparse": (True, GLOBAL_BATCH * MAX_LENGTH, 1, True),
    "padded, dense": (False, 0, 2, False),
    "packed, dense": (True, 2 * MAX_LENGTH, 1, False),
    "packed tightly, sparse": (True, 2 * MAX_LENGTH, 1, True),
}


def dataset() -> TokenDataset:
    """Rows of 4 to 24 tokens, a prompt and an answer; one row without tokens, one without a prompt."""
    random = np.random.RandomState(0)
    lengths = random.randint(4, MAX_LENGTH + 1, size=ROWS)
    lengths[3] = 0
    masks = [np.arange(n) >= (0 if row == 5 else n * 2 // 3) for row, n in enumerate(lengths)]
    tokens = random.randint(3, 96, size=int(lengths.sum()))
    return TokenDataset("tiny", tokens, np.concatenate(masks), np.cumsum([0, *lengths]))


def case(name: str, label: str) -> dict[str, Any]:
    packed, budget, accumulation, sparse = CASES[label]
    base = run_config(name)
    world = ranks_here().world_size
    per_device = GLOBAL_BATCH // world // accumulation
    train = replace(
        base.train,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=budget // world if packed else None,
    )
    config = replace(base, train=train, data=replace(base.data, packing=packed, max_length=MAX_LENGTH))
    engine = make_engine(config)
    model = tiny_lora(targets=ALL_LINEAR)
    use_packed_attention(model.get_base_model())
    apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE | {"enabled": sparse}))
    state: Any = find_state(model)
    engine.prepare(model)
    data = dataset()
    sampler = GlobalBatchSampler(data.lengths, per_device, world, accumulation, seed=1)
    feed = Feed(config, engine, data, pad_token_id=0, quadratic=0.01)
    seen: dict[str, Any] = {"loss": [], "masks": [], "micro-batches": []}
    for step in range(STEPS):
        batch = feed.laid_out(sampler.batch(step))
        labels, total = int(data.label_counts[batch.indices].sum()), 0.0
        masks = []
        for number in range(batch.accumulation):
            inputs = feed.inputs(batch.micro_batch(number, engine.ranks.rank))
            state.context.hand_over(inputs.labels, inputs.partition)
            loss = engine.model(
                **inputs.arguments, labels=inputs.labels, use_cache=False, num_items_in_batch=labels / world
            ).loss
            engine.backward(loss, last=number == batch.accumulation - 1)
            total += loss.item()
            masks.append(selection(model))
        engine.step()
        seen["loss"].append(engine.all_sum(total / world)[0])
        seen["masks"].append(masks)
        seen["micro-batches"].append(batch.accumulation)
        if step == 0:
            seen["gradients"] = {k: 10 * v for k, v in engine.full_moments()[0].items() if k.endswith(".exp_avg")}
    seen["parameters"] = engine.full_parameters()
    seen["evaluation"] = evaluate(engine, state.context, feed, batch_size=2)
    close(engine)
    return seen


def all_cases(name: str) -> dict[str, Any]:
    return {label: case(name, label) for label in CASES}
