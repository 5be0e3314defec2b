"""The ``sparse_lora`` section: defaults, round trips, and refusals that name key, value and remedy."""

import copy
import json
import pickle
import re
from typing import Any

import pytest

from sparselora_dist.config import GROUPS, ConfigError, SparseLoRAConfig

MATH = {
    "ffn": {"3-30": 0.99},
    "qk": {"14-19,21-23,25-29": 0.75},
    "vo": {"14-19": 0.75, "21-23": 0.75, "25-29": 0.75},
}


def test_defaults_are_the_documented_ones() -> None:
    assert SparseLoRAConfig().to_dict() == {
        "enabled": True,
        "rank": 8,
        "layers": {},
        "start_step": 0.0,
        "end_step": None,
        "mask_sync": "global",
        "interval": 1,
        "reference": "sparse",
        "lora_branch": "kept",
        "skip_unused_logits": True,
        "merge_lora": False,
        "factors": None,
    }


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"layers": MATH, "start_step": 0.05},
        {
            "start_step": 3,
            "end_step": 10,
            "mask_sync": "local",
            "interval": 4,
            "lora_branch": "dense",
            "factors": "f.st",
        },
        {"start_step": 0.25, "end_step": 1.0, "enabled": False, "rank": 16, "layers": {"vo": {"0": 0}}},
    ],
)
def test_round_trips(tmp_path: Any, data: dict[str, Any]) -> None:
    config = SparseLoRAConfig.from_dict(data)
    assert SparseLoRAConfig.from_dict(config.to_dict()) == config == SparseLoRAConfig(**data)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    again = SparseLoRAConfig.from_json(tmp_path / "c.json")
    assert again == config and type(again.end_step) is type(config.end_step)  # 1.0 and 1 differ in meaning
    (tmp_path / "c.yaml").write_text(json.dumps(config.to_dict()))  # YAML holds JSON
    assert SparseLoRAConfig.from_yaml(tmp_path / "c.yaml") == config
    assert SparseLoRAConfig.from_file(str(tmp_path / "c.yaml")) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_yaml_as_people_write_it(tmp_path: Any) -> None:
    path = tmp_path / "c.yml"
    path.write_text("rank: 4\nstart_step: 0.05\nlayers:\n  ffn:\n    1-2: 0.9\n    5: 0.5\n")
    assert SparseLoRAConfig.from_yaml(path).layers == {"ffn": {"1-2": 0.9, "5": 0.5}}
    with pytest.raises(ConfigError, match=r"c\.yml'.*\.json is expected"):
        SparseLoRAConfig.from_json(path)
    with pytest.raises(ConfigError, match=r"\.yaml or \.yml is expected"):
        SparseLoRAConfig.from_yaml(tmp_path / "c.json")


def test_sparsity_of_a_model() -> None:
    config = SparseLoRAConfig(layers=MATH)
    got = config.sparsity(32)
    assert tuple(got) == GROUPS
    assert got["ffn"] == dict.fromkeys(range(3, 31), 0.99)
    assert got["qk"] == got["vo"] == dict.fromkeys([*range(14, 20), *range(21, 24), *range(25, 30)], 0.75)
    assert SparseLoRAConfig().sparsity(4) == {"ffn": {}, "qk": {}, "vo": {}, "experts": {}}
    assert SparseLoRAConfig(layers={"vo": {"0-3": 0}}).sparsity(4)["vo"] == dict.fromkeys(range(4), 0.0)
    with pytest.raises(ConfigError, match=r"^'sparse_lora.layers.ffn' range '3-30' reaches beyond .* layers 0-15$"):
        config.sparsity(16)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rnak": 8}, "unknown key 'sparse_lora.rnak': did you mean 'rank'\\? known: enabled, end_step, factors"),
        ({"_target_": "os.system"}, "'sparse_lora._target_' is refused .*os.system.*never an import path; remove"),
        ({"trust_remote_code": True}, "'sparse_lora.trust_remote_code' is refused .*never executed"),
        (
            {"layers": {"fnn": {"1": 0.5}}},
            "unknown key 'sparse_lora.layers.fnn': did you mean 'ffn'\\? known: experts, ffn, qk, vo",
        ),
        ({"layers": {"q": {"1": 0.5}}}, "unknown key 'sparse_lora.layers.q'"),
        ({"layers": []}, "'sparse_lora.layers' is \\[\\]: allowed: an object such as"),
        ({"layers": {"ffn": 0.9}}, "'sparse_lora.layers.ffn' is 0.9: allowed: an object of ranges"),
        (
            {"layers": {"ffn": {"1": 1.0}}},
            "'sparse_lora.layers.ffn' range '1' has the sparsity 1.0: allowed: .*\\[0, 1\\)",
        ),
        ({"layers": {"qk": {"1": -0.1}}}, "'sparse_lora.layers.qk' range '1' has the sparsity -0.1"),
        ({"layers": {"qk": {"1": float("nan")}}}, "'sparse_lora.layers.qk' range '1' has the sparsity NaN"),
        ({"layers": {"vo": {"1": True}}}, "'sparse_lora.layers.vo' range '1' has the sparsity true"),
        ({"layers": {"vo": {"1": "0.9"}}}, "'sparse_lora.layers.vo' range '1' has the sparsity \"0.9\""),
        ({"layers": {"vo": {"7-3": 0.9}}}, "'sparse_lora.layers.vo' range '7-3' is reversed: write '3-7'"),
        ({"layers": {"vo": {"../x": 0.9}}}, "'sparse_lora.layers.vo' has the range \"../x\": expected layer numbers"),
        ({"rank": 0}, "'sparse_lora.rank' is 0: allowed: integers from 1"),
        ({"rank": "8"}, "'sparse_lora.rank' is \"8\": expected an integer; write 8"),
        ({"interval": 0}, "'sparse_lora.interval' is 0: allowed: integers from 1"),
        ({"mask_sync": "globl"}, '\'sparse_lora.mask_sync\' is "globl": expected one of .*did you mean "global"'),
        ({"lora_branch": "none"}, '\'sparse_lora.lora_branch\' is "none": expected one of "kept", "dense"'),
        ({"factors": ""}, "'sparse_lora.factors' is \"\": allowed: the path"),
        ({"enabled": 1}, "'sparse_lora.enabled' is 1: expected true or false"),
        ({"start_step": 1.5}, "'sparse_lora.start_step' is 1.5: allowed: a float in \\[0, 1\\]"),
        ({"start_step": -1}, "'sparse_lora.start_step' is -1: allowed"),
        ({"start_step": None}, "'sparse_lora.start_step' is null: expected a number"),
        ({"start_step": True}, "'sparse_lora.start_step' is true: expected a number"),
        ({"end_step": -0.5}, "'sparse_lora.end_step' is -0.5: allowed"),
        ({"end_step": 0}, "'sparse_lora.end_step' is 0: allowed: more than 0, or null"),
        (
            {"start_step": 0.5, "end_step": 0.5},
            "'sparse_lora.end_step' is 0.5: allowed: more than sparse_lora.start_step",
        ),
        ({"start_step": 9, "end_step": 3}, "'sparse_lora.end_step' is 3: allowed: more than sparse_lora.start_step"),
    ],
)
def test_refusals(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SparseLoRAConfig.from_dict(data)
    if not re.match(r"unknown key 'sparse_lora\.\w+'|'sparse_lora\.(_target_|trust)", words):
        with pytest.raises(ValueError, match=words):  # built by hand, the same answer
            SparseLoRAConfig(**data)


def test_a_config_keeps_its_own_copy() -> None:
    layers = {"ffn": {"1": 0.5}}
    config = SparseLoRAConfig(layers=layers)
    layers["ffn"]["2"] = 0.5
    config.to_dict()["layers"]["ffn"]["3"] = 0.5
    assert config.layers == {"ffn": {"1": 0.5}}


def test_end_step_one_is_the_whole_run_however_json_spells_it() -> None:
    assert type(SparseLoRAConfig.from_dict({"end_step": 1}).end_step) is float
    assert SparseLoRAConfig.from_dict({"end_step": 2}).end_step == 2
