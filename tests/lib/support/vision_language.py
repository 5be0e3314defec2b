"""Tiny vision-language models with random weights, and batches whose prompts hold an image each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .every_type import VOCABULARY, rows

IMAGE, VIDEO, START = 90, 91, 92
_PATCHES = 4
"""Image tokens of a prompt, beginning at its third position."""
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Angles of time, height and width.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
_QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 14,
    "out_hidden_size": 64,
}
_QWEN_TOP = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": START + 1}


def _squares(side: int) -> Callable[[Tensor], dict[str, Tensor]]:
    def images(ids: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": _noise(len(ids), 3, side, side)}

    return images


def _tiles(ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _noise(len(ids), 1, 3, 56, 56)}


def _patches(ids: Tensor) -> dict[str, Tensor]:
    """4 x 4 patches an image, of two frames of 14 x 14; four of them are a token."""
    grid = torch.tensor([[1, 4, 4]] * len(ids))
    pixels = _noise(len(ids) * 16, 3 * 2 * 14 * 14)
    return {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


def _positioned(ids: Tensor) -> dict[str, Tensor]:
    """4 x 4 patches an image, four of them a token; where they are is told."""
    places = torch.tensor([[x, y] for y in range(4) for x in range(4)]).expand(len(ids), -1, -1)
    pixels = _noise(len(ids), 16, 3 * 14 * 14)
    return {"pixel_values": pixels, "image_position_ids": places, "mm_token_type_ids": (ids == IMAGE).int()}


def _sized(ids: Tensor) -> dict[str, Tensor]:
    """4 x 4 patches an image, four of them a token."""
    return _squares(56)(ids) | {"image_sizes": torch.tensor([[56, 56]] * len(ids))}


def _typed(ids: Tensor) -> dict[str, Tensor]:
    """Image tokens attend to each other both ways."""
    return _squares(28)(ids) | {"token_type_ids": (ids == IMAGE).long()}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# Of a type: its text decoder's own settings, its vision tower's, its own, and what a batch has beside tokens.
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], Callable[[Tensor], dict[str, Tensor]]]] = {
    "qwen2_vl": (
        _MROPE,
        {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14, "hidden_size": 64},
        {"image_token_id": IMAGE, **_QWEN_TOP},
        _patches,
    ),
    "qwen2_5_vl": (_MROPE, {**_QWEN, "fullatt_block_indexes": [1]}, {"image_token_id": IMAGE, **_QWEN_TOP}, _patches),
    "qwen3_vl": (
        _MROPE,
        {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        {"image_token_id": IMAGE, **_QWEN_TOP},
        _patches,
    ),
    # A hybrid: two layers with linear attention, then a usual one.
    "qwen3_5": (
        {**_MROPE, "layer_types": ["linear_attention"] * 2 + ["full_attention"], "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        {**_QWEN, "num_position_embeddings": 16},
        {"image_token_id": IMAGE, **_QWEN_TOP},
        _patches,
    ),
    "gemma4": (
        {"sliding_window": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "vocab_size_per_layer_input": VOCABULARY, "num_global_key_value_heads": 2},
        {**_CLIP, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 64},
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 94, "audio_config": None},
        _positioned,
    ),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", **_CLIP, "head_dim": 16, "image_size": 56},
                 {"image_token_index": IMAGE}, _sized),
    "gemma3": (
        {"query_pre_attn_scalar": 16, "sliding_window": 16},
        {**_CLIP, "image_size": 28},
        {"image_token_index": IMAGE, "mm_tokens_per_image": _PATCHES},
        _typed,
    ),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **_CLIP, "image_size": 28, "projection_dim": 32},
              {"image_token_index": IMAGE}, _squares(28)),
    "smolvlm": ({"model_type": "llama"}, {**_CLIP, "image_size": 56}, {"image_token_id": IMAGE, "scale_factor": 2}, _tiles),
    "internvl": (
        {"model_type": "qwen2"},
        {**_CLIP, "patch_size": [14, 14], "image_size": [56, 56]},
        {"image_token_id": IMAGE},
        _squares(56),
    ),
}  # fmt: skip


def tiny_model(model_type: str) -> Any:
    """In fp32, text decoder of three layers."""
    text, vision, own = copy.deepcopy(TYPES[model_type][:3])  # A config fills in what it is given.
    config = CONFIG_MAPPING[model_type](text_config=_TEXT | text, vision_config=vision, pad_token_id=0, **own)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)  # Gemma's projection of images.
            elif parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(3)  # So that channels differ.
    return model.float()


def batch(model_type: str) -> dict[str, Tensor]:
    """Prompts with an image and of different lengths, and an answer; the image has no label."""
    data = rows()
    ids = data["input_ids"]
    ids[ids >= IMAGE] = 5
    ids[:, 1], ids[:, 2 : 2 + _PATCHES], ids[:, 2 + _PATCHES] = START, IMAGE, START + 1
    data["labels"] = torch.where(data["labels"] == -100, data["labels"], ids)
    return data | TYPES[model_type][3](ids)
