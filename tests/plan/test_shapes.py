"""Shapes by name and from a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparselora_dist.config import ConfigError
from sparselora_dist.plan.shapes import KNOWN, find_shape, from_hf_config
from support.models import FAMILIES, tiny_base

# Parameters as the models' cards give them (the sum over their safetensors files).
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "llama-3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_size(name: str) -> None:
    assert find_shape(name).elements == PUBLISHED[name]


def test_every_known_name_finds_itself() -> None:
    for name, shape in KNOWN.items():
        assert find_shape(name.upper()) is shape


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_config_gives_the_size_of_its_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_base(family, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    elements = sum(p.numel() for p in model.parameters())
    assert find_shape(str(tmp_path)).elements == elements
    assert find_shape(str(tmp_path / "config.json")).elements == elements


def test_biases_of_llama() -> None:
    model = tiny_base("llama", attention_bias=True, mlp_bias=True)
    assert from_hf_config(model.config.to_dict(), "x").elements == sum(p.numel() for p in model.parameters())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'org/llama-3-71b'.*did you mean 'llama-3-70b'.*config\.json.*qwen3-8b"):
        find_shape("org/llama-3-71b")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 0}, "'hidden_size' is 0: allowed: integers from 1"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is None"),
        ({"num_key_value_heads": 4}, "6 query heads are not a multiple of 4 key/value heads"),
        ({"model_type": "rwkv"}, r"'rwkv'\) is not supported: rwkv\.blocks\.0 is not known"),
        (
            {"model_type": "nonsense"},
            "'model_type' is 'nonsense': allowed: types that the installed Transformers knows",
        ),
    ],
)
def test_bad_configs_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    data = {**tiny_base().config.to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(data, default=str))
    with pytest.raises(ValueError, match=message):
        find_shape(str(tmp_path))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        find_shape(str(tmp_path))
