"""A family in small, to look at before its model is loaded, and to try rows packed in a line on.

The model has the run's own switches (sliding windows, softcaps, sinks, kinds of layers, scalings) and random weights of a
few hundred elements a row, so that a trial on the host takes some ten milliseconds, whatever the size of the real one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from .packed_attention import IMPLEMENTATION, PackedRows, use_packed_attention

_VOCABULARY, _WINDOW, _LAYERS = 64, 5, 6
_LENGTHS = (9, 4, 7)
# What of these a config has is set, where it is larger. Widths of heads stay: rotary tables are made for them.
_AT_MOST = {
    "vocab_size": _VOCABULARY, "intermediate_size": 48, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "sliding_window": _WINDOW, "attention_chunk_size": _WINDOW, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": _VOCABULARY, "shared_intermediate_size": 32,
    "pad_token_id": 0, "bos_token_id": 0, "max_window_layers": 1, "first_k_dense_replace": 1, "index_topk": 4,
}  # fmt: skip
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type", "hybrid_layer_pattern")


def cannot_pack(config: Any) -> str | None:
    """Why rows of this family must not be laid in one line, or ``None``: tried, on a model in small.

    Args:
        config: of the real model.
    """
    try:
        small = miniature(config)
        model = _with_weights(small, "eager")
        line, rows = _line(small.vocab_size)
        expected = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], 1)
        use_packed_attention(model, instead_of=("eager",))
        lengths = PackedRows.of(torch.tensor(_LENGTHS), torch.device("cpu")).arguments(IMPLEMENTATION)
        got = model(**line, **lengths, use_cache=False).logits
    except Exception as error:
        return f"it could not be tried in small ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    if got.shape != expected.shape or not torch.allclose(
        got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    ):
        return "its layers let rows see their neighbours, or read a mask that packed rows do not have"
    return None


def without_weights(config: Any) -> Any | None:
    """A model in small on the meta device, or as large as it is where the family cannot be made so small.

    ``None`` where Transformers makes none of it.
    """
    for shape in (miniature, copy.deepcopy):
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    shape(config), attn_implementation="eager", trust_remote_code=False
                )
        except Exception:
            continue
    return None


def miniature(config: Any) -> Any:
    """The config of a small model of the same family with the same switches."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    small = copy.deepcopy(text)
    for name, most in _AT_MOST.items():
        value = getattr(small, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            setattr(small, name, most)
    small.eos_token_id = 0
    heads, kv_heads = (
        small.num_attention_heads,
        getattr(small, "num_key_value_heads", None) or small.num_attention_heads,
    )
    dim = getattr(small, "head_dim", None) or small.hidden_size // heads
    small.num_attention_heads = 4
    if hasattr(small, "num_key_value_heads"):
        small.num_key_value_heads = 4 if kv_heads == heads else 2
    small.hidden_size = 4 * dim
    small.num_hidden_layers = min(small.num_hidden_layers, _enough_layers(text))
    for name in _PER_LAYER:
        if isinstance(getattr(small, name, None), (list, tuple)):
            setattr(small, name, getattr(small, name)[: small.num_hidden_layers])
    return small


def _enough_layers(config: Any) -> int:
    """So many that each kind of layer is among them."""
    kinds = list(getattr(config, "layer_types", None) or [])
    return max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])


def _with_weights(config: Any, implementation: str) -> Any:
    state = torch.get_rng_state()  # The run's own adapters begin as without a trial.
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=torch.float32, trust_remote_code=False
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:
                    parameter.normal_(std=0.2)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)
    return model.float().eval().requires_grad_(False)


def _line(vocabulary: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Rows in a line, and each by itself."""
    ids = torch.arange(1, 1 + sum(_LENGTHS)).mul(7).remainder(vocabulary)[None]
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    return {"input_ids": ids, "position_ids": positions}, list(ids.split(_LENGTHS, 1))
