"""Shapes of the models that the benchmarks and the demo make with random weights: the planner's, and a Llama of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import LlamaConfig

from sparselora_dist.method.channels import HeadGeometry
from sparselora_dist.plan.shapes import KNOWN, ModelShape


def llama(*, hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> ModelShape:
    """A decoder whose heads divide its hidden size."""
    geometry = HeadGeometry(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads)
    return ModelShape(family="llama", hidden=hidden, width=width, layers=layers, heads=geometry, vocabulary=vocabulary)


SHAPES = {
    "8b": KNOWN["llama-3-8b"],
    "70b": KNOWN["llama-3-70b"],
    "1b": llama(hidden=2048, width=5632, layers=22, heads=32, kv_heads=4, vocabulary=32000),
    "demo": llama(hidden=128, width=768, layers=5, heads=4, kv_heads=2, vocabulary=512),
    "small": llama(hidden=512, width=1408, layers=3, heads=8, kv_heads=2, vocabulary=1024),
    "tiny": llama(hidden=64, width=192, layers=3, heads=4, kv_heads=2, vocabulary=128),
}
"""Llama 3's, TinyLlama's, the embedded model's, one that is quick to check on a GPU, and one for a CPU."""


def stack(shape: ModelShape, layers: int) -> ModelShape:
    """Some of the layers as a model of its own, the vocabulary cut in the same proportion (to a multiple of 64)."""
    return replace(shape, layers=layers, vocabulary=max(64, round(shape.vocabulary * layers / shape.layers / 64) * 64))


def hf_config(shape: ModelShape, **more: Any) -> LlamaConfig:
    """Its Hugging Face configuration, with ``more`` keys."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads.heads,
        num_key_value_heads=shape.heads.kv_heads,
        head_dim=shape.heads.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        **more,
    )
