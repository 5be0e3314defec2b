"""The JSON Schema of run files: up to date, named by every file in configs/, and strict where the run is."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from jsonschema import Draft202012Validator

from sparselora_dist.cli import main
from sparselora_dist.cli.schema import run_schema
from sparselora_dist.config import ConfigError, RunConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path for path in FOLDER.glob("*.json") if path.name != "schema.json")
SCHEMA: dict[str, Any] = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "org/model"},
    "data": {"train": "train.jsonl"},
    "train": {"output_dir": "runs/x"},
}


def errors(run: Any) -> list[Any]:
    return list(Draft202012Validator(SCHEMA).iter_errors(run))


def with_key(section: str, key: str, value: Any) -> dict[str, Any]:
    run = copy.deepcopy(MINIMAL)
    run.setdefault(section, {"name": "fsdp2"} if section == "engine" else {})[key] = value
    return run


def test_the_file_is_what_the_sections_say(tmp_path: Path) -> None:
    """If not: ``make schema``."""
    Draft202012Validator.check_schema(SCHEMA)
    assert run_schema() == SCHEMA
    assert main(["schema", "--output", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_bytes() == (FOLDER / "schema.json").read_bytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_file_names_it_and_fits_it(path: Path) -> None:
    run = json.loads(path.read_text(encoding="utf-8"))
    assert next(iter(run)) == "$schema" and not Path(run["$schema"]).is_absolute()
    assert (path.parent / run["$schema"]).resolve() == FOLDER / "schema.json"
    assert errors(run) == []
    assert errors(RunConfig.from_file(path).to_dict()) == []


MISTAKES = [
    # a key that is none
    ("train", "lerning_rate", 1e-3),
    ("sparse_lora", "layer", {}),
    ("sparse_lora", "layers", {"fnn": {"1": 0.5}}),
    ("quantization", "load_in_8bit", True),
    ("engine", "fsdp", {"fsdp_reshard_after_foward": True}),
    ("engine", "fsdp", {"fsdp_mixed_precision_policy": {"param_dtyp": "bf16"}}),
    ("lora", "lora_alhpa", 16),
    ("lora", "use_dora", True),
    ("trian", "seed", 1),
    # a wrong type
    ("model", "dtype", "float16"),
    ("train", "learning_rate", "2e-4"),
    ("train", "max_steps", True),
    ("train", "eval_steps", "never"),
    ("train", "report_to", "wandbb"),
    ("train", "report_to", ["tensorboard", "wandbb"]),
    ("train", "lr_scheduler_type", "cosin"),
    ("train", "optim", "sgd"),
    ("sparse_lora", "mask_sync", "globl"),
    ("engine", "name", "zero2"),
    ("engine", "fsdp", {"fsdp_version": 1}),
    ("lora", "target_modules", 3),
    ("lora", "init_from", 3),
    ("lora", "init_from", ""),
    # a value out of range
    ("train", "learning_rate", -1),
    ("train", "per_device_train_batch_size", 0),
    ("train", "max_steps", 0),
    ("train", "adam_beta2", 1.0),
    ("train", "warmup_ratio", 1.1),
    ("data", "max_length", 1),
    ("sparse_lora", "rank", 0),
    ("sparse_lora", "start_step", 1.5),
    ("sparse_lora", "layers", {"ffn": {"1-3": 1.0}}),
    ("sparse_lora", "layers", {"ffn": {"3..5": 0.5}}),
    ("engine", "fsdp", {"dp_shard_size": 0}),
    ("lora", "lora_dropout", 1.0),
]


@pytest.mark.parametrize(("section", "key", "value"), MISTAKES)
def test_a_mistake_is_flagged_as_the_run_refuses_it(section: str, key: str, value: Any) -> None:
    run = with_key(section, key, value)
    assert errors(run)
    with pytest.raises(ConfigError):
        RunConfig.from_dict(run)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "max_steps", -1),
        ("train", "report_to", ["tensorboard", "wandb"]),
        ("train", "resume", True),
        ("train", "optim", "paged_adamw_8bit"),
        ("sparse_lora", "end_step", 20),
        ("sparse_lora", "layers", {"ffn": {"3-30, 31": 0.99, "1": 0}}),
        ("engine", "fsdp", {"dp_shard_size": "auto", "fsdp_mixed_precision_policy": {"param_dtype": "bf16"}}),
        ("lora", "rank_pattern", {"q_proj": 4}),
        ("lora", "init_from", "runs/mine/adapter"),
    ],
)
def test_what_a_run_takes_is_not_flagged(section: str, key: str, value: Any) -> None:
    run = with_key(section, key, value)
    assert errors(run) == []
    run.setdefault("sparse_lora", {"enabled": False}).setdefault("layers", {"ffn": {"1": 0.5}})
    RunConfig.from_dict({"$schema": "schema.json", **run})


def test_every_key_is_described() -> None:
    for name, definition in SCHEMA["$defs"].items():
        assert definition["additionalProperties"] is False, name
        for key, value in definition["properties"].items():
            assert name == "LoraSection" or "description" in value or "$ref" in value, f"{name}.{key}"
    known = set(SCHEMA["$defs"]["LoraSection"]["properties"])
    assert {"r", "lora_alpha", "rank_pattern", "init_from"} <= known
    assert known - {"init_from"} <= {*peft.LoraConfig.__dataclass_fields__}
    assert not known & {"use_dora", "megatron_core", "auto_mapping", "trust_remote_code"}
