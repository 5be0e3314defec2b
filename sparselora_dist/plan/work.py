"""What a GPU computes in a micro-batch, and what it keeps for that: FLOPs, activations, logits.

Activations are an estimate, by what PyTorch keeps for backward. Per token and layer, in bytes, with e the bytes of a
value, H, I the model's widths, q and kv those of the projections, r the adapter ranks:

    e (4 H + 2 q + 2 kv + Σ r) + 8 H + 4 e I

two norms (input and output, and their fp32 copies), rotated q and k, v and attention's output, and gate, up, their
activation and product. A context token of a layer with sparse FFN keeps k instead of I neurons (with ``lora_branch``
"dense" and adapters there, all of them); where the LM head skips positions without labels, they keep none in the last
layer. With checkpointing: every layer's input, e H, and one layer's working set. In both cases the gradients that flow
through one layer are added, e (2 H + 2 I) a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselora_kernels import chunk_rows, row_bytes

from ..config import RunConfig
from ..method.channels import FFN
from ..method.flops import TRIMMED, FlopModel, LayerShare, layer_shares
from ..method.masked_flops import MaskedMatrix, MaskedWork
from .parts import Tree
from .shapes import ModelShape
from .storage import checkpointing


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a GPU gets in a micro-batch."""

    tokens: int
    context: float = 0.75
    """Share of the tokens that carry no label: the sparse layers compute these sparsely."""
    length: int
    """Tokens of a sequence."""


@dataclass(frozen=True, slots=True)
class Work:
    """Of a GPU: FLOPs of an optimizer step, bytes of a micro-batch."""

    dense_flops: float
    """As plain LoRA, recomputation included."""
    executed_flops: float
    activations: int
    logits: int
    mask_flops: float = 0.0
    """Among those executed, of masked adapters (``sparse_base``) above plain ones; below zero where they are fewer."""
    mask_elements: int = 0
    """Of the transient matrix that they take."""


def shares(shape: ModelShape, config: RunConfig) -> tuple[LayerShare, ...]:
    """Kept share of every group in every layer."""
    sparse = config.sparse_lora
    sparsity = sparse.sparsity(shape.layers, shape.able) if sparse.enabled else {}
    return layer_shares(shape.layers, shape.channels, sparsity)


def flop_model(shape: ModelShape, config: RunConfig, tree: Tree) -> FlopModel:
    """The FLOP model of a run, as :func:`sparselora_dist.train.metrics.flop_model` makes it of the loaded model."""
    return FlopModel(
        hidden=shape.hidden,
        width=shape.width,
        vocabulary=shape.vocabulary,
        heads=shape.heads,
        lora_elements=sum(p.numel for p in tree.parameters() if p.trainable),
        layers=shares(shape, config),
        estimator_rank=config.sparse_lora.rank,
        lora_elements_trimmed=sum(
            p.numel for p in tree.layers[-1].walk() if p.trainable and set(p.name.split(".")) & set(TRIMMED)
        ),
        sizes=shape.sizes,
        trims=shape.trims,
        masked=_masked(config, tree),
    )


def _masked(config: RunConfig, tree: Tree) -> MaskedWork | None:
    """With ``sparse_base`` all adapted matrices: which of them are pruned, the weights say."""
    if not config.sparse_base.enabled:
        return None
    found = []
    for number, module in enumerate(tree.layers):
        factors = {p.name: p.shape for p in module.walk() if p.trainable}
        for name, (rank, columns) in factors.items():
            path, _, side = name.rpartition(".")
            # The numbered adapters of experts are no linears'.
            if side == "lora_A" and not (own := path.rpartition(".")[2]).isdigit():
                rows = factors[f"{path}.lora_B"][0]
                found.append(MaskedMatrix(layer=number, name=own, rows=rows, columns=columns, rank=rank))
    return MaskedWork(tuple(found), config.sparse_base.gradient)


def work(shape: ModelShape, config: RunConfig, tree: Tree, batch: Batch) -> Work:
    """Of a GPU, with the run's sparsity and checkpointing. Not counted: NF4 decoding, the optimizer, elementwise work."""
    model = flop_model(shape, config, tree)
    context = batch.tokens * batch.context if config.sparse_lora.enabled else 0.0
    labels = batch.tokens * (1 - batch.context) if config.sparse_lora.skip_unused_logits else None
    dense = model.dense(batch.tokens, batch.length)
    executed = model.executed(batch.tokens - context, context, batch.length, labels)
    masks = model.masks(batch.tokens - context, context, labels, 1)
    if checkpointing(config) != "none":
        dense += _recomputed(model, shape, batch.tokens, 0.0, batch.length)
        executed += _recomputed(model, shape, batch.tokens - context, context, batch.length, labels)
        again = model.masks(batch.tokens - context, context, labels, 1, forward_only=True)
        executed, masks = executed + again, masks + again
    steps = config.train.gradient_accumulation_steps
    size = 2 if config.model.dtype == "bfloat16" else 4
    activations = _activations(shape, config, tree, batch, context, labels, size)
    return Work(
        steps * dense,
        steps * executed,
        activations,
        _logits(shape, config, batch, labels),
        steps * masks,
        masked_buffer(model),
    )


def masked_buffer(model: FlopModel) -> int:
    """Elements of the one matrix that a masked adapter takes above plain LoRA: the largest; 0 without masks. With NF4 it is
    the matrix that is decoded anyway."""
    return max((one.rows * one.columns for one in model.masked.matrices), default=0) if model.masked else 0


def _logits(shape: ModelShape, config: RunConfig, batch: Batch, labels: float | None) -> int:
    """At label positions, one chunk of them and the gradient of their hidden states; else all logits, their fp32 copy,
    its gradient, and the logits' gradient (in fp32 there is no copy)."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    if labels is not None:
        rows = min(labels, chunk_rows(shape.vocabulary, dtype))
        return int(rows * shape.vocabulary * row_bytes(dtype) + labels * shape.hidden * dtype.itemsize)
    return batch.tokens * shape.vocabulary * (2 * dtype.itemsize + 8 if dtype.itemsize == 2 else 3 * dtype.itemsize)


def _recomputed(
    model: FlopModel, shape: ModelShape, dense: float, context: float, length: int, labels: float | None = None
) -> float:
    """Forward FLOPs of the decoder layers: 2 a multiply-add, attention's products over half the square."""
    every = 4 * model.products * length / 2 + 2 * model.lora_elements
    kept = 2 * sum(map(model.layer_elements, range(shape.layers), model.layers))
    flops = dense * (every + 2 * model.frozen) + context * (every + kept)
    if labels is not None and model.trims:
        flops -= (dense - labels) * 2 * (model.trimmed_elements(LayerShare()) + model.lora_elements_trimmed)
        flops -= context * 2 * (model.trimmed_elements(model.layers[-1]) + model.lora_elements_trimmed)
    return flops


def _activations(
    shape: ModelShape, config: RunConfig, tree: Tree, batch: Batch, context: float, labels: float | None, size: int
) -> int:
    q, kv = shape.heads.heads * shape.heads.head_dim, shape.heads.kv_heads * shape.heads.head_dim
    model, layers = flop_model(shape, config, tree), []
    for number, (module, share) in enumerate(zip(tree.layers, shares(shape, config)), 1):
        adapters = [p for p in module.walk() if p.trainable and p.name.endswith("lora_A")]
        # A masked adapter is a matrix, and no product of it is rank-wide.
        ranks = 0 if config.sparse_base.enabled else sum(p.shape[0] for p in adapters)
        full = config.sparse_lora.lora_branch == "dense" and any(name in p.name for p in adapters for name in FFN)
        kept = 1.0 if full else share.ffn
        size_of = model.size(number - 1)
        neurons = ((batch.tokens - context) + context * kept) * size_of.width
        if number == shape.layers and labels is not None and shape.trims:
            neurons = labels * size_of.width
        neurons += ((batch.tokens - context) + context * share.experts) * size_of.active * size_of.expert_width
        token = size * (4 * shape.hidden + 2 * q + 2 * kv + ranks) + 8 * shape.hidden
        layers.append(batch.tokens * token + 4 * size * neurons)
    flowing = batch.tokens * size * 2 * (shape.hidden + shape.width)
    if checkpointing(config) == "none":
        return int(sum(layers) + flowing)
    return int(shape.layers * batch.tokens * size * shape.hidden + max(layers) + flowing)


def decode_buffer(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of the largest matrix of a layer, decoded for its dense tokens; a mixture's experts are one."""
    if shape.largest:
        return shape.largest * dtype.itemsize
    return max(rows * columns for rows, columns in map(shape.matrix, ("q_proj", *FFN))) * dtype.itemsize
