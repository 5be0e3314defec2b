"""A tiny model of every causal model type that the installed Transformers has, and what can be sparse in it.

``python tests/lib/support/every_type.py docs/models.md`` (``make models``) writes the table of ``docs/models.md`` anew.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparselora_dist.layouts import UnsupportedModelError, decoder_layers

VOCABULARY = 96
# Whatever of these a config has is set. Four layers, so that hybrids have one of each kind.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "residual_dropout": 0.0,
    "d_model": 64, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 112, "n_positions": 128, "num_layers": 4,
    "num_heads": 4, "n_layers": 4, "n_heads": 4, "ffn_dim": 112,
    "decoder_layers": 4, "encoder_layers": 1, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 112, "encoder_ffn_dim": 112, "word_embed_proj_dim": 64,
    # Mixtures of experts.
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "decoder_sparse_step": 1, "shared_intermediate_size": 32, "moe_num_experts": 4,
    "expert_ffn_hidden_size": 32, "ffn_hidden_size": 112, "moe_topk": 2, "moe_k": 2, "num_dense_layers": 1,
    "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    # Latent attention.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    # Linear attention and state spaces.
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_d_ssm": 128, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4,
    # Gemma.
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16,
    "query_pre_attn_scalar": 16, "num_kv_shared_layers": 0, "num_global_key_value_heads": 2, "sliding_window": 16,
    "partial_rotary_factor": 0.5, "layers_block_type": None,
}  # fmt: skip
_LARGEST = 3_000_000
_DROPOUT = ("dropout", "activation_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "layerdrop", "router_jitter_noise",
            "hidden_dropout_prob", "attention_probs_dropout_prob")  # fmt: skip
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
# What the type's own defaults or checks need otherwise.
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ),
        _LATENT,
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_key_value_heads": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
}


def model_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Raises whatever the type raises where it cannot be made so small."""
    kind = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    options = {name: value for name, value in _SMALL.items() if name in known and value is not None}
    if "partial_rotary_factor" in options and getattr(kind, "partial_rotary_factor", 1.0) in (None, 1.0):
        del options["partial_rotary_factor"]
    options |= {name: 0.0 for name in _DROPOUT if name in known}
    config = kind(**(options | _OWN.get(model_type, {}) | changes))
    with torch.device("meta"):
        elements = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if elements > _LARGEST:
        raise ValueError(f"its smallest has {elements:,} parameters")
    return config


def tiny_model(model_type: str, config: Any = None) -> Any:
    """With random weights, in fp32. Raises as :func:`tiny_config` does."""
    config = config or tiny_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(3)  # So that channels differ.
    return model.float()


def rows(rows: int = 3, length: int = 18) -> dict[str, torch.Tensor]:
    """Prompts of different lengths with an answer, without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : length // 2 + row] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


GROUPS = ("ffn", "qk", "vo", "experts")


@dataclass(frozen=True)
class Support:
    """What can be sparse in the tiny model of a type."""

    model_type: str
    groups: dict[str, list[int]]
    """By group, the layers that can."""
    layers: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    """By group, why a layer cannot: of the first that cannot."""
    untried: str = ""
    """Why there is no such model."""

    @property
    def row(self) -> str:
        """Its line of the table."""
        if self.untried:
            cells = ["", "", "", "", f"not tried: {self.untried}"]
        else:
            counts = [len(self.groups[group]) for group in GROUPS]
            cells = ["all" if n and n == self.layers else f"{n} of {self.layers}" if n else "" for n in counts]
            cells.append("; ".join(f"{', '.join(names)}: {text}" for text, names in self._by_reason().items()))
        return f"| `{self.model_type}` | " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    def _by_reason(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for group in GROUPS:
            if group in self.reasons and self.reasons[group] != "it has no routed experts":
                found.setdefault(self.reasons[group], []).append(group)
        return found


def support(model_type: str) -> Support:
    """By building the model on the meta device and looking at it."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(model_type), attn_implementation="eager")
    except Exception as error:
        return Support(model_type, {group: [] for group in GROUPS}, untried=str(error).strip().splitlines()[0])
    try:
        layers = decoder_layers(model)
    except UnsupportedModelError as error:
        return Support(model_type, {group: [] for group in GROUPS}, reasons=dict.fromkeys(GROUPS, str(error)))
    groups = {group: [layer.index for layer in layers if group not in layer.missing] for group in GROUPS}
    reasons: dict[str, str] = {}
    for layer in layers:
        for group, reason in layer.missing.items():
            reasons.setdefault(group, reason)
    return Support(model_type, groups, len(layers), reasons)


TABLE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
_ROW = re.compile(r"^\| `([\w-]+)` \|(.*)\|$")


def documented() -> tuple[str, dict[str, str]]:
    """The version of Transformers of the table in the docs, and its lines by model type."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    version = next(found[1] for line in lines if (found := re.search(r"Transformers ([\d.]+\d)", line)))
    return version, {found[1]: line for line in lines if (found := _ROW.match(line))}


def write(path: Path) -> None:
    """Put the table into the page, in the place of the one that is there."""
    found = [support(name) for name in model_types()]
    some = [one for one in found if any(one.groups.values())]
    counts = {group: sum(bool(one.groups[group]) for one in found) for group in GROUPS}
    every = sum(all(one.groups[group] for group in GROUPS[:3]) for one in found)
    head = (
        f"Transformers {transformers.__version__} has {len(found)} causal model types. `ffn` works in "
        f"{counts['ffn']} of them, `qk` in {counts['qk']}, `vo` in {counts['vo']}, all three in {every}; `experts` in "
        f"{counts['experts']} mixtures. "
        "The number is of a small model's four layers; *all* is every layer."
    )
    lines = [head, "", "| model type | ffn | qk | vo | experts | why not |", "|---|---|---|---|---|---|"]
    rest = [one for one in found if one not in some]
    for one in [*some, *rest]:
        lines.append(one.row)
    before = path.read_text(encoding="utf-8").partition("\nTransformers ")[0]
    path.write_text("\n".join([before, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    write(Path(sys.argv[1]))
