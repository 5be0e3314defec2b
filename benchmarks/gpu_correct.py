"""Whether a sparse step is right: its gradients against the masked dense step, and that it does not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_sides import Side
from torch import Tensor

from sparselora_dist import selection
from sparselora_dist.layouts import base_linear, decoder_layers, geometry
from sparselora_dist.method.tokens import partition_tokens

TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.25, 0.1)}
"""Of a gradient's norm: the worst matrix, and all of them together. Two ways to sum in bf16 are 12 % and 7 % apart in the 32
layers of Llama-3-8B's shape, by rounding alone; a wrong channel shows in fp32."""


def check_step(dense: Side, sparse: Side, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Difference between the gradients of the sparse step and of the dense step in which the dropped channels are set to
    zero, relative to their norm: of the worst matrix, and of all. ``dense`` has the weights and adapters of ``sparse``."""
    sparse.gradients(batch)
    with _dropped(dense.model, selection(sparse.model), partition_tokens(batch["labels"].cpu()).context):
        dense.gradients(batch)
    got = {name: p.grad for name, p in sparse.model.named_parameters() if p.requires_grad}
    apart: list[tuple[float, float]] = []
    for name, parameter in dense.model.named_parameters():
        if parameter.requires_grad:
            want, have = parameter.grad, got[name]
            missing = want is None or have is None
            apart.append((math.inf, 1.0) if missing else ((want - have).norm().item(), want.norm().item()))
    dense.clear(), sparse.clear()
    if not all(math.isfinite(value) for pair in apart for value in pair):
        return math.inf, math.inf
    worst = max(difference / max(norm, 1e-12) for difference, norm in apart)
    return worst, math.hypot(*(d for d, _ in apart)) / math.hypot(*(n for _, n in apart))


@contextmanager
def _dropped(model: Any, kept: dict[int, dict[str, Tensor]], context: Tensor) -> Iterator[None]:
    """Set to zero, for the ``context`` rows, what the channels outside ``kept`` give."""
    heads, handles = geometry(model), []
    # Base and branch as one operation would pass by the base's own hooks.
    fused = {module: module.__dict__.pop("forward") for module in model.modules() if "forward" in module.__dict__}
    for layer in decoder_layers(model):
        chosen = kept.get(layer.index, {})
        projections: Any = layer.module.self_attn
        if "ffn" in chosen:
            handles.append(layer.module.mlp.down_proj.register_forward_pre_hook(_before(chosen["ffn"], context)))
        if "qk" in chosen:
            for name, rows in (("q_proj", heads.q_rows(chosen["qk"])), ("k_proj", heads.k_rows(chosen["qk"]))):
                handles.append(base_linear(getattr(projections, name)).register_forward_hook(_after(rows, context)))
        if "vo" in chosen:
            rows, columns = heads.v_rows(chosen["vo"]), heads.o_columns(chosen["vo"])
            handles.append(base_linear(projections.v_proj).register_forward_hook(_after(rows, context)))
            handles.append(base_linear(projections.o_proj).register_forward_pre_hook(_before(columns, context)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in fused.items():
            module.__dict__["forward"] = forward


def _masked(x: Tensor, kept: Tensor, context: Tensor) -> Tensor:
    tokens = x.shape[:-1].numel()
    if context.numel() and context[-1] >= tokens:
        return x  # Rows that carry a label, packed: all of them are dense.
    keep = torch.ones(tokens, x.shape[-1], dtype=x.dtype)
    keep[context] = 0
    keep[context[:, None], kept.cpu()] = 1
    return x * keep.to(x.device).view_as(x)


def _before(kept: Tensor, context: Tensor) -> Any:
    return lambda module, args: (_masked(args[0], kept, context), *args[1:])


def _after(kept: Tensor, context: Tensor) -> Any:
    return lambda module, args, output: _masked(output, kept, context)


def check_no_host_wait(side: Side, batch: dict[str, Tensor], set_mode: Callable[[str], None]) -> None:
    """Run a step in which every wait for the device is an error, from the first decoder layer to the end of backward.

    ``set_mode`` is ``torch.cuda.set_sync_debug_mode``. Before the first layer the labels are split, which waits once, and
    Transformers looks at its mask.
    """
    first = decoder_layers(side.model)[0].module
    handle = first.register_forward_pre_hook(lambda *_: set_mode("error"))
    try:
        side.gradients(batch)
    finally:
        set_mode("default")
        handle.remove()
        side.clear()
