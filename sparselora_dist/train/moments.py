"""What the frozen matrices of a model read: second moments of their inputs over the context tokens of some rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..layouts import DecoderLayer, decoder_layers
from ..method.tokens import partition_tokens

Moments = dict[tuple[int, str], Tensor]
"""(layer, matrix) -> E[x xᵀ] (in, in) fp32 on the CPU; matrices that read the same tensor share one."""

READERS = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
"""One matrix of each input -> all that read it."""


@torch.no_grad()
def second_moments(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Moments:
    """Run ``batches`` (input_ids, attention_mask, labels) through the model, dense, and sum ``x xᵀ`` at every layer.

    The tokens are those that choose the channels in training: context tokens, without padding.

    Raises:
        ValueError: no batch has a context token.
    """
    sums: Moments = {}
    context = torch.empty(0, dtype=torch.int64)

    def add(layer: int, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).index_select(0, context).float()
        product = (x.t() @ x).cpu()
        sums[layer, name] = sums[layer, name].add_(product) if (layer, name) in sums else product

    training, tokens = model.training, 0
    model.eval()
    handles = [
        _parent(layer, name).register_forward_pre_hook(partial(add, layer.index, name))
        for layer in decoder_layers(model)
        for name in READERS
    ]
    try:
        for batch in batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            context = partition_tokens(batch["labels"], batch.get("attention_mask")).context
            tokens += context.numel()
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not tokens:
        raise ValueError("none of the rows has a context token: there is no prompt to take second moments from")
    return {
        (layer, reader): moment.div_(tokens) if reader == name else moment
        for (layer, name), moment in sums.items()
        for reader in READERS[name]
    }


def _parent(layer: DecoderLayer, name: str) -> nn.Module:
    """The module whose input the matrix reads: PEFT's layer around q, or the MLP, which hands its input to gate and up."""
    assert layer.ffn is not None
    module: nn.Module = layer.linear(name) if name == "q_proj" else layer.ffn.module
    return module
