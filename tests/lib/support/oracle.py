"""An independent oracle of the sparse layers: plain PEFT, whole products, and hooks that zero the dropped channels.

Everything here is written from the definition, head by head and token by token; nothing of the package is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from support.compare import assert_close, loss_logits
from support.models import gradients

Masks = dict[int, dict[str, Tensor]]


@dataclass
class Step:
    """What one training step gives."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def train_step(model: nn.Module, data: dict[str, Tensor], autocast: bool = False) -> Step:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**data)
    out.loss.backward()
    return Step(out.loss.detach(), out.logits.detach(), gradients(model))


def assert_same(expected: Step, got: Step, data: dict[str, Tensor], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Loss, the logits that it reads, and every gradient; ``atol`` is relative to each tensor's largest value."""
    logits = [loss_logits(step.logits, data["labels"]) for step in (expected, got)]
    assert expected.gradients.keys() == got.gradients.keys()
    assert expected.gradients, "nothing was trained"
    pairs = [("loss", expected.loss, got.loss), ("logits", *logits)]
    pairs += [(name, expected.gradients[name], got.gradients[name]) for name in expected.gradients]
    for name, a, b in pairs:
        scale = max(float(a.abs().max()), 1e-3)
        assert_close(name, a, b, rtol=rtol, atol=atol * max(scale, 1.0) if name in ("loss", "logits") else atol * scale)


def context_tokens(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(context, padding) as (B, S) booleans."""
    labels, mask = data["labels"], data["attention_mask"]
    context, padding = torch.zeros_like(labels, dtype=torch.bool), mask == 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            own = labels[row, t] != -100
            following = t + 1 < labels.shape[1] and labels[row, t + 1] != -100
            context[row, t] = not own and not following and bool(mask[row, t])
    return context, padding


def owned_rows(chosen: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """For q, k, v (rows) and o (columns): 1.0 at what the kept channels own, 0.0 elsewhere."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // heads
    owned = {name: torch.zeros((heads if name in "qo" else kv_heads) * dim) for name in "qkvo"}
    for channel in chosen.get("qk", torch.arange(kv_heads * dim // 2)).tolist():
        h, pair = channel // (dim // 2), channel % (dim // 2)
        for d in (pair, pair + dim // 2):
            owned["k"][h * dim + d] = 1
            for g in range(heads):
                if g // (heads // kv_heads) == h:
                    owned["q"][g * dim + d] = 1
    for channel in chosen.get("vo", torch.arange(kv_heads * dim)).tolist():
        h, d = channel // dim, channel % dim
        owned["v"][h * dim + d] = 1
        for g in range(heads):
            if g // (heads // kv_heads) == h:
                owned["o"][g * dim + d] = 1
    return owned


def base(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def drop(model: nn.Module, masks: Masks, data: dict[str, Tensor], lora_branch: str = "kept") -> nn.Module:
    """Make the plain PEFT ``model`` leave out, densely, what a sparse model with ``masks`` leaves out."""
    context, padding = context_tokens(data)
    inner = model.get_base_model()
    for index, chosen in masks.items():
        layer = inner.model.layers[index]
        owned = owned_rows(chosen, inner.config)
        for group, roles in (("qk", "qk"), ("vo", "vo")):
            for role in roles if group in chosen else "":
                linear = base(getattr(layer.self_attn, f"{role}_proj"))
                if role == "o":
                    linear.register_forward_pre_hook(_InputMask(_kept(owned[role], context)))
                    linear.register_forward_hook(_OutputMask((~padding)[..., None]))
                else:
                    linear.register_forward_hook(_OutputMask(_kept(owned[role], context) * (~padding)[..., None]))
        if "ffn" in chosen:
            neurons = torch.zeros(inner.config.intermediate_size)
            neurons[chosen["ffn"]] = 1
            kept, mlp = _kept(neurons, context), layer.mlp
            mlp.register_forward_hook(_OutputMask((~padding)[..., None]))
            if lora_branch == "kept":
                mlp.down_proj.register_forward_pre_hook(_InputMask(kept))
            else:
                base(mlp.gate_proj).register_forward_hook(_OutputMask(kept))
                base(mlp.up_proj).register_forward_hook(_OutputMask(kept))
                base(mlp.down_proj).register_forward_pre_hook(_InputMask(kept))
    return model


def _kept(owned: Tensor, context: Tensor) -> Tensor:
    """(B, S, n): ``owned`` at context tokens, 1.0 at the others."""
    return torch.where(context[..., None], owned, torch.ones_like(owned))


class _InputMask:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (args[0] * self.mask.to(args[0].dtype), *args[1:])


class _OutputMask(_InputMask):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:  # type: ignore[override]
        return output * self.mask.to(output.dtype)
