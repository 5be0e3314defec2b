"""What the frozen matrices of a model read: second moments of their inputs over the context tokens of some rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..layouts import DecoderLayer, decoder_layers
from ..method.tokens import partition_tokens

Moments = dict[tuple[int, str], Tensor]
"""(layer, matrix) -> E[x xᵀ] (in, in) fp32 on the CPU; matrices that read the same tensor share one."""


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

    layers = decoder_layers(model)
    training, tokens = model.training, 0
    model.eval()
    handles = [
        module.register_forward_pre_hook(partial(add, layer.index, names[0]))
        for layer in layers
        for module, names in _readers(layer)
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
        (layer.index, name): sums[layer.index, names[0]].div_(tokens if name == names[0] else 1)
        for layer in layers
        for _, names in _readers(layer)
        for name in names
    }


def _readers(layer: DecoderLayer) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """What is given each input of the layer, and the scored matrices that read it."""
    attention = tuple(name for group in ("qk", "vo") if group not in layer.missing for name in layer.scored(group))
    if attention:
        yield layer.linear(layer.within(attention[0])[0]), attention
    if layer.ffn is not None:
        # A gated FFN hands its input to gate and up; one without is called with more, or is the layer itself.
        plain = layer.ffn.kind == "plain"
        yield layer.linear("up_proj") if plain else layer.ffn.module, layer.scored("ffn")
