"""The shape of a model: from a Hugging Face ``config.json``, or by name without a network."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.sparse import GROUPS
from ..method.channels import ATTENTION, FFN, HeadGeometry
from ..method.flops import LayerSize
from .known import ROWS, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What the arithmetic needs to know of a decoder of a supported family."""

    family: str
    hidden: int
    width: int
    """Intermediate size of the FFN."""
    layers: int
    heads: HeadGeometry
    vocabulary: int
    tied: bool = False
    """The LM head is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMS norm of one head's width on q and on k (Qwen3)."""
    data: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """Of a family that is not modelled by hand: its ``config.json``, of which a model without weights is made."""
    sizes: tuple[LayerSize, ...] = ()
    """Of each layer of such a family."""
    counts: tuple[Mapping[str, int], ...] = field(default=(), compare=False, repr=False)
    """Of each of them, the channels by group of which a share is kept (:func:`sparselora_dist.layouts.widths`)."""
    parameters: int = 0
    """Of such a family, all of them."""
    largest: int = 0
    """Elements of the largest matrix of a layer of such a family; its experts are one."""
    trims: bool = True
    """Whether the last layer runs q, o and FFN at label positions only, where the LM head does."""

    @property
    def channels(self) -> tuple[Mapping[str, int], ...]:
        """By group, of each layer."""
        return self.counts or (self.heads.channel_counts(self.width),) * self.layers

    @property
    def able(self) -> dict[str, list[int]]:
        """The layers that can be sparse, by group."""
        return {g: [i for i, counts in enumerate(self.channels) if g in counts] for g in GROUPS}

    def matrix(self, name: str) -> tuple[int, int]:
        """(out, in) of ``q_proj`` ... ``down_proj``."""
        q, kv = self.heads.heads * self.heads.head_dim, self.heads.kv_heads * self.heads.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.width, self.hidden),
            "up_proj": (self.width, self.hidden),
            "down_proj": (self.hidden, self.width),
        }[name]

    def has_bias(self, name: str) -> bool:
        if name in FFN:
            return self.mlp_bias
        return self.o_bias if name == "o_proj" else self.qkv_bias

    @property
    def elements(self) -> int:
        """Parameters of the base model, all of them."""
        if self.parameters:
            return self.parameters
        layer = 2 * self.hidden + (2 * self.heads.head_dim if self.qk_norm else 0)
        for name in (*ATTENTION, *FFN):
            rows, columns = self.matrix(name)
            layer += rows * columns + (rows if self.has_bias(name) else 0)
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)


def from_hf_config(data: dict[str, Any], source: str) -> ModelShape:
    """From the object in a Hugging Face ``config.json``.

    Raises:
        ConfigError: a key is missing or no positive integer; the message names it and ``source``.
        UnsupportedModelError: no layer of the family has anything that can be sparse.
    """
    if data.get("model_type") not in ROWS:
        return _of_any(data, source)
    family = data["model_type"]

    def integer(key: str, default: int | None = None) -> int:
        value = data.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{source}: '{key}' is {value!r}: allowed: integers from 1")
        return value

    count = integer("num_attention_heads")
    hidden = integer("hidden_size")
    attention_bias = bool(data.get("attention_bias", False))
    try:
        heads = HeadGeometry(
            heads=count,
            kv_heads=integer("num_key_value_heads", count),
            head_dim=integer("head_dim", hidden // count),
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    # Mistral has no biases whatever the key says; Qwen2 has them on q, k and v without a key.
    own = family in ("llama", "qwen3") and attention_bias
    return ModelShape(
        family=family,
        hidden=hidden,
        width=integer("intermediate_size"),
        layers=integer("num_hidden_layers"),
        heads=heads,
        vocabulary=integer("vocab_size"),
        tied=bool(data.get("tie_word_embeddings", False)),
        qkv_bias=own or family == "qwen2",
        o_bias=own,
        mlp_bias=family == "llama" and bool(data.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def _of_any(data: dict[str, Any], source: str) -> ModelShape:
    """Of a family that is not modelled by hand."""
    from ..layouts import decoder_layers, described, layer_sizes, widths

    model = described(data, source)
    config, layers = model.config.get_text_config(), decoder_layers(model)
    sizes = layer_sizes(layers, config)
    known = next((layer.attention.heads for layer in layers if layer.attention), None)
    counts = [{g: n for g, n in widths(layer).items() if g not in layer.missing} for layer in layers]
    return ModelShape(
        family=data["model_type"],
        hidden=config.hidden_size,
        width=next((size.width for size in sizes if size.width), 0),
        layers=len(layers),
        heads=known or HeadGeometry(heads=config.num_attention_heads, kv_heads=1, head_dim=2),
        vocabulary=config.vocab_size,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        data=data,
        sizes=sizes,
        counts=tuple(counts),
        parameters=sum(p.numel() for p in model.parameters()),
        largest=max(
            [
                *(layer.matrix(name).weight.numel() for layer in layers for name in layer.names),
                *(2 * e.count * e.width * e.hidden for layer in layers if (e := layer.experts)),
            ]
        ),
        trims=bool(layers[-1].trims),
    )


def _of_row(family: str, row: Row) -> ModelShape:
    hidden, width, layers, heads, kv_heads, head_dim, vocabulary, tied = row
    return ModelShape(
        family=family,
        hidden=hidden,
        width=width,
        layers=layers,
        heads=HeadGeometry(heads=heads, kv_heads=kv_heads, head_dim=head_dim),
        vocabulary=vocabulary,
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


KNOWN: dict[str, ModelShape] = {
    name: _of_row(family, row) for family, rows in ROWS.items() for name, row in rows.items()
}
"""By :func:`canonical` name."""


def find_shape(name_or_path: str) -> ModelShape:
    """The shape of a known model (``"meta-llama/Meta-Llama-3-70B"``, ``"llama-3-70b"``), of a folder or a config file.

    Raises:
        ConfigError: neither; the message lists the known names.
    """
    path = Path(name_or_path)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file}: not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{file}: expected a model's config, an object of keys and values")
        return from_hf_config(data, str(file))
    if path.is_dir():
        raise ConfigError(
            f"{path} holds no config.json: give a model folder in Hugging Face format, or its config.json"
        )
    key = canonical(name_or_path)
    if key in KNOWN:
        return KNOWN[key]
    near = difflib.get_close_matches(key, KNOWN, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(
        f"the model '{name_or_path}' is neither a file nor known by name: {hint}give the path of its config.json, or one "
        f"of: {', '.join(KNOWN)}"
    )


def canonical(name: str) -> str:
    """``org/Meta-Llama-3-70B-Instruct`` -> ``llama-3-70b``: what known shapes are listed under."""
    key = name.lower().rstrip("/").rsplit("/", 1)[-1].replace("_", "-").removeprefix("meta-") + "-"
    # A tuned model has the shape of its base.
    for word in ("-instruct-", "-base-", "-chat-", "-hf-"):
        key = key.replace(word, "-")
    return key.strip("-")
