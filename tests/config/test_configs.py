"""Every file in configs/ is a run that parses and fits its model."""

from dataclasses import replace
from pathlib import Path

import pytest

from sparselora_dist.config import RunConfig, expand_ranges

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path for path in FOLDER.glob("*.json") if path.name != "schema.json")
MATH = {"ffn": {"3-30": 0.99}, "qk": {"14-19,21-23,25-29": 0.75}, "vo": {"14-19,21-23,25-29": 0.75}}
COMMONSENSE = {"ffn": {"17-30": 0.97}, "qk": {"17-19,21-23,25-29": 0.2}, "vo": {"17-19,21-23,25-29": 0.2}}


def num_layers(name: str) -> int:
    return 32 if "_8b_" in name else 80 if "_70b_" in name else 5


def test_all_are_there() -> None:
    names = {path.stem for path in FILES}
    assert {"single_sparse", "zero3_sparse", "fsdp2_sparse"} <= names
    for engine in ("zero3", "fsdp2"):
        assert {f"llama3_8b_math_{engine}", f"llama3_8b_commonsense_{engine}"} <= names
        assert {f"llama3_70b_math_{engine}", f"llama3_70b_math_{engine}_multinode"} <= names


@pytest.mark.parametrize("path", [path for path in FILES if "_70b_" in path.stem], ids=lambda path: path.stem)
def test_70b_weights_are_nf4_and_stay_inside_a_node(path: Path) -> None:
    config = RunConfig.from_file(path)
    assert config.quantization.load_in_4bit and config.quantization.bnb_4bit_use_double_quant
    inside = "multinode" in path.stem
    if config.engine.name == "fsdp2":
        assert config.engine.fsdp_mesh(64) == ((8, 8) if inside else (1, 64))
    else:
        zero = config.engine.deepspeed_config()["zero_optimization"]
        assert zero.get("zero_hpz_partition_size") == (8 if inside else None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parses_and_fits_its_model(path: Path) -> None:
    config = RunConfig.from_file(path)
    assert RunConfig.from_dict(config.to_dict()) == config
    sparsity = config.sparse_lora.sparsity(num_layers(path.stem))
    assert config.sparse_lora.enabled and sparsity["ffn"] and config.sparse_lora.start_step == 0.05
    assert config.train.output_dir == f"runs/{path.stem}"
    assert next(name for name in ("single", "zero3", "fsdp2") if name in path.stem) == config.engine.name
    assert config.lora.build().r == config.lora.values["r"]
    assert (config.comment is not None and "UNCALIBRATED" in config.comment) == ("_70b_" in path.stem)
    if path.stem.startswith("llama3"):
        assert config.model.dtype == "bfloat16" and config.train.gradient_checkpointing
        assert config.train.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_published_sparsity(engine: str) -> None:
    assert RunConfig.from_file(FOLDER / f"llama3_8b_math_{engine}.json").sparse_lora.layers == MATH
    assert RunConfig.from_file(FOLDER / f"llama3_8b_commonsense_{engine}.json").sparse_lora.layers == COMMONSENSE


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_70b_ranges_are_the_8b_ones_in_proportion(engine: str) -> None:
    layers = RunConfig.from_file(FOLDER / f"llama3_70b_math_{engine}.json").sparse_lora.layers
    for group, ranges in MATH.items():
        for (small, value), (large, same) in zip(ranges.items(), layers[group].items()):
            ends = [int(end) for piece in small.split(",") for end in piece.split("-")]
            assert [int(end) for piece in large.split(",") for end in piece.split("-")] == [
                int(end * 80 / 32 + 0.5) for end in ends
            ]
            assert value == same and max(expand_ranges(layers[group])) < 80


def test_the_two_engines_of_a_task_run_the_same_method() -> None:
    for path in FILES:
        if path.stem.endswith("_zero3") or path.stem == "zero3_sparse":
            twin = RunConfig.from_file(path.with_name(path.name.replace("zero3", "fsdp2")))
            one = RunConfig.from_file(path)
            assert (one.model, one.lora, one.sparse_lora, one.data) == (
                twin.model,
                twin.lora,
                twin.sparse_lora,
                twin.data,
            )
            assert replace(one.train, output_dir="x") == replace(twin.train, output_dir="x")
