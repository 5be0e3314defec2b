"""What a sparse layer launches beyond a dense one, in a training step with non-reentrant checkpointing.

Counted for one layer in the middle, as a model of four layers less one of three, on the way that a GPU takes.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.method.tokens import partition_tokens
from sparselora_kernels.backend import forced_triton
from support.launches import Launches
from support.models import batch, tiny_lora

KINDS: dict[str, tuple[str, ...]] = {"dense": (), "ffn": ("ffn",), "ffn + attention": ("ffn", "qk", "vo")}
BUDGET = {"ffn": 32, "ffn + attention": 167}
"""Launches beyond a dense layer's."""
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])


def of_a_step(kind: str, layers: int, dtype: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    """Launches of the forward, and of backward and recomputation; LoRA on q, k, v and o, fp32, on a base of ``dtype``."""
    model = tiny_lora(num_hidden_layers=layers)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    sparse = {group: {f"0-{layers - 1}": 0.5} for group in KINDS[kind]}
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": sparse} if sparse else {"enabled": False}))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    inputs, state = batch(), find_state(model)
    with forced_triton():
        for _ in range(2):  # The first step fills caches.
            model.zero_grad()
            state.context.hand_over(inputs["labels"], partition_tokens(inputs["labels"], inputs["attention_mask"]))
            with Launches() as forward, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            with Launches() as backward:
                loss.backward()
    return forward.names, backward.names


@cache
def of_a_layer(kind: str, dtype: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    more, less = (of_a_step(kind, layers, dtype) for layers in (4, 3))
    for counts, fewer in zip(more, less):
        counts.subtract(fewer)
    return more


def total(kind: str, dtype: torch.dtype) -> int:
    return sum(counts.total() for counts in of_a_layer(kind, dtype))


@dtypes
@pytest.mark.parametrize("kind", BUDGET)
def test_a_sparse_layer_keeps_its_budget(kind: str, dtype: torch.dtype) -> None:
    more = total(kind, dtype) - total("dense", dtype)
    assert more <= BUDGET[kind], (more, of_a_layer(kind, dtype))


@dtypes
def test_the_count_sees_our_kernels_and_torchs(dtype: torch.dtype) -> None:
    forward, backward = of_a_layer("ffn + attention", dtype)
    assert forward["score_kernel"] == 1 + 3 and forward["select_kernel"] == 3
    assert "score_kernel" not in +backward and "select_kernel" not in +backward
    assert forward["_scaled_dot_product_flash_attention_for_cpu"] == 1
