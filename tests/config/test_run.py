"""A whole run in one file: defaults, round trips, overrides, and what each section refuses."""

import copy
import json
from dataclasses import FrozenInstanceError, replace
from pathlib import PurePosixPath
from typing import Any, get_args

import pytest

from sparselora_dist.config import ConfigError, EngineSection, LoraSection, RunConfig, TrainSection
from sparselora_dist.config.train import Tracker

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "org/model"},
    "data": {"train": "train.jsonl"},
    "train": {"output_dir": "runs/x"},
}
ZERO = {
    "zero_optimization": {"stage": 3, "overlap_comm": True},
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
}
FSDP = {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_mixed_precision_policy": {"param_dtype": "bf16"}}


def run(**sections: Any) -> RunConfig:
    data = copy.deepcopy(MINIMAL)
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.from_dict(data)


def test_defaults() -> None:
    got = run()
    assert (got.model.dtype, got.model.attn_implementation, got.data.max_length) == ("bfloat16", "sdpa", 1024)
    assert got.sparse_lora.enabled is False and got.engine.name == "single" and got.comment is None
    assert got.lora.values["r"] == 16 and got.lora.values["lora_alpha"] == 32
    train = got.train
    assert (train.max_steps, train.num_train_epochs, train.learning_rate, train.seed) == (-1, 1.0, 2e-4, 42)
    assert (train.report_to, train.trackers, train.resume, train.ddp_timeout) == ("none", (), False, 1800)
    assert train.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert run(train={"report_to": ["tensorboard", "none"]}).train.trackers == ("tensorboard",)
    assert run(sparse_lora={"layers": {"ffn": {"1": 0.5}}}).sparse_lora.enabled is True


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"_comment": "a note", "engine": {"name": "zero3", "deepspeed": ZERO}},
        {"engine": {"name": "fsdp2", "fsdp": FSDP}, "sparse_lora": {"layers": {"ffn": {"1-2": 0.9}}, "end_step": 1.0}},
        {
            "lora": {
                "r": 4,
                "rank_pattern": {"q_proj": 2},
                "use_rslora": True,
                "use_dora": False,
                "target_modules": "all",
            }
        },
        {"train": {"report_to": ["tensorboard"], "resume": "runs/x/checkpoint-6", "eval_steps": 5, "max_steps": 9}},
    ],
)
def test_round_trips(tmp_path: Any, sections: dict[str, Any]) -> None:
    config = run(**sections)
    assert RunConfig.from_dict(config.to_dict()) == config
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config.to_dict()))
    assert RunConfig.from_file(path) == config
    assert ("_comment" in config.to_dict()) == ("_comment" in sections)


def test_overrides_reach_every_depth(tmp_path: Any) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**MINIMAL, "engine": {"name": "zero3", "deepspeed": ZERO}}))
    words = ["--train.learning_rate", "1e-3", "--train.resume=true", "--sparse_lora.layers.ffn", '{"1-7":0.9}']
    words += ["--engine.deepspeed.zero_optimization.stage3_max_live_parameters", "5", "--lora.r", "4"]
    got = RunConfig.from_file(path, overrides=words)
    assert (got.train.learning_rate, got.train.resume, got.lora.values["r"]) == (1e-3, True, 4)
    assert got.sparse_lora.enabled and got.sparse_lora.layers == {"ffn": {"1-7": 0.9}}
    zero = got.engine.deepspeed_config()["zero_optimization"]
    assert zero == {"stage": 3, "overlap_comm": True, "stage3_max_live_parameters": 5}
    with pytest.raises(ConfigError, match=r"'engine.deepspeed.zero_optimization.stage' is 2: allowed: 3"):
        RunConfig.from_file(path, ["--engine.deepspeed.zero_optimization.stage", "2"])
    with pytest.raises(ConfigError, match=r"unknown key 'train.learning_rte': did you mean 'learning_rate'"):
        RunConfig.from_file(path, ["--train.learning_rte", "1"])
    with pytest.raises(ConfigError, match="unknown key 'trian': did you mean 'train'"):
        RunConfig.from_file(path, ["--trian.seed", "1"])


@pytest.mark.parametrize("missing", ["model", "data", "train"])
def test_missing_sections(missing: str) -> None:
    data = {key: value for key, value in MINIMAL.items() if key != missing}
    key = {"model": "model.name_or_path", "data": "data.train", "train": "train.output_dir"}[missing]
    with pytest.raises(ConfigError, match=f"missing key '{key}': expected a string"):
        RunConfig.from_dict(data)


LOFTQ: dict[str, Any] = {"init_lora_weights": "loftq"}
BCQ3, FP8 = {"format": "bcq", "bits": 3}, {"format": "fp8"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    # top level
    ({"sparselora": {}}, "unknown key 'sparselora': did you mean 'sparse_lora'\\? known: _comment, data, engine, lora"),
    ({"learning_rate": 1}, "unknown key 'learning_rate' outside the sections: did you mean 'train.learning_rate'\\?"),
    ({"comment": "x"}, "unknown key 'comment': did you mean '_comment'"),
    ({"_comment": 3}, "'_comment' is 3: expected a string"),
    ({"_target_": "os.system"}, "'_target_' is refused .*never an import path; remove"),
    ({"train": [1]}, "'train' is \\[1\\]: expected an object"),
    # model
    (
        {"model": {"trust_remote_code": True}},
        "'model.trust_remote_code' is refused .true.: code .* never executed.*remove",
    ),
    ({"model": {"_target_": "x.y"}}, "'model._target_' is refused"),
    ({"model": {"_comment": "x"}}, "unknown key 'model._comment'"),
    ({"model": {"dtype": "float16"}}, '\'model.dtype\' is "float16": expected one of "float32", "bfloat16"; did you'),
    ({"model": {"name_or_path": ""}}, "'model.name_or_path' is \"\": allowed: the path"),
    ({"model": {"name_or_path": "org/../../etc"}}, "'model.name_or_path' is \"org/../../etc\": .*never contains '..'"),
    ({"model": {"name_or_path": "..\\up"}}, "'model.name_or_path' .*folder that exists"),
    (
        {"model": {"attn_implementation": "org/kernel:fn"}},
        "'model.attn_implementation' is \"org/kernel:fn\": allowed: eager, sdpa, .*flex_attention, or null",
    ),
    ({"model": {"attn_implementation": False}}, "'model.attn_implementation' is false: expected a string or null"),
    # data
    ({"data": {"trian": "x"}}, "unknown key 'data.trian': did you mean 'train'"),
    ({"data": {"train": ""}}, "'data.train' is \"\": allowed"),
    ({"data": {"eval": ""}}, "'data.eval' is \"\": allowed"),
    ({"data": {"max_length": 1}}, "'data.max_length' is 1: allowed: integers from 2"),
    ({"data": {"eval_limit": 0}}, "'data.eval_limit' is 0: allowed: integers from 1, or null"),
    # sparse_lora
    ({"sparse_lora": {}}, "'sparse_lora.enabled' is true, but 'sparse_lora.layers' is empty.*name layers, such as"),
    ({"sparse_lora": {"layers": {"ffn": {}}}}, "'sparse_lora.layers' is empty"),
    ({"sparse_lora": {"rnak": 1}}, "unknown key 'sparse_lora.rnak': did you mean 'rank'"),
    # train
    ({"train": {"lerning_rate": 1}}, "unknown key 'train.lerning_rate': did you mean 'learning_rate'"),
    ({"train": {"learning_rate": "2e-4"}}, "'train.learning_rate' is \"2e-4\": expected a number; write 0.0002"),
    ({"train": {"learning_rate": -1}}, "'train.learning_rate' is -1.0: allowed: numbers from 0"),
    ({"train": {"max_steps": 0}}, "'train.max_steps' is 0: allowed: integers from 1, or -1"),
    ({"train": {"max_steps": True}}, "'train.max_steps' is true: expected an integer"),
    ({"train": {"num_train_epochs": 0}}, "'train.num_train_epochs' is 0.0: allowed: numbers above 0"),
    ({"train": {"adam_beta2": 1.0}}, "'train.adam_beta2' is 1.0: allowed: numbers in \\[0, 1\\)"),
    ({"train": {"adam_epsilon": 0}}, "'train.adam_epsilon' is 0.0"),
    ({"train": {"warmup_ratio": 1.1}}, "'train.warmup_ratio' is 1.1: allowed: numbers in \\[0, 1\\]"),
    (
        {"train": {"per_device_train_batch_size": 0}},
        "'train.per_device_train_batch_size' is 0: allowed: integers from 1",
    ),
    ({"train": {"save_steps": 0}}, "'train.save_steps' is 0: allowed: integers from 1, or null"),
    ({"train": {"lr_scheduler_type": "cosin"}}, "'train.lr_scheduler_type' is \"cosin\": .*did you mean 'cosine'"),
    (
        {"train": {"report_to": "wandbb"}},
        "'train.report_to' is \"wandbb\": allowed: none, all, tensorboard.*mean 'wandb'",
    ),
    ({"train": {"report_to": ["tensorbord"]}}, "'train.report_to' .*did you mean 'tensorboard'"),
    ({"train": {"max_tokens_per_micro_batch": 0}}, "'train.max_tokens_per_micro_batch' is 0: allowed: integers from 1"),
    (
        {"train": {"max_tokens_per_micro_batch": 100}, "data": {"max_length": 200}},
        "'train.max_tokens_per_micro_batch' is 100, but .*'data.max_length' 200 .*from 200, or null",
    ),
    (
        {"data": {"packing": True}, "model": {"attn_implementation": "eager"}},
        "'data.packing' is true, but 'model.attn_implementation' is \"eager\".*use \"sdpa\"",
    ),
    ({"train": {"resume": ""}}, "'train.resume' is \"\": allowed: true, false, or the path"),
    ({"train": {"output_dir": ""}}, "'train.output_dir' is \"\": allowed: the path"),
    (
        {"train": {"gradient_checkpointing_kwargs": {"use_reentrnt": True}}},
        "use_reentrnt': did you mean 'use_reentrant'",
    ),
    ({"train": {"gradient_checkpointing_kwargs": {"use_reentrant": 1}}}, "use_reentrant' is 1: expected true or false"),
    (
        {"train": {"optim": "adamw_8bits"}},
        '\'train.optim\' is "adamw_8bits": expected one of .*did you mean "adamw_8bit"',
    ),
    ({"train": {"optim": 8}}, "'train.optim' is 8: expected one of \"adamw_torch\", .* or null"),
    ({"train": {"report_to": 3}}, "'train.report_to' is 3: allowed: none, all, tensorboard"),
    ({"train": {"logging_dir": ""}}, "'train.logging_dir' is \"\": allowed: a path, or null"),
    # engine
    ({"engine": {}}, 'missing key \'engine.name\': expected one of "single", "zero3", "fsdp2"'),
    ({"engine": {"name": "zero2"}}, '\'engine.name\' is "zero2": .*did you mean "zero3"'),
    (
        {"engine": {"name": "zero3", "zero_optimization": {}}},
        "'engine.zero_optimization': .*put it under 'engine.deepspeed'",
    ),
    ({"engine": {"name": "zero3", "bf16": {}}}, "unknown key 'engine.bf16': it is DeepSpeed's: put it under"),
    ({"engine": {"name": "fsdp2", "fsdp_version": 2}}, "'engine.fsdp_version': put it under 'engine.fsdp'"),
    (
        {"engine": {"name": "fsdp2", "deepspeed": ZERO}},
        "'engine.deepspeed' is given, but 'engine.name' is \"fsdp2\": remove",
    ),
    (
        {"engine": {"name": "fsdp2", "fsdp": {"fsdp_cpu_ram_efficient_loading": 1}}},
        "'engine.fsdp.fsdp_cpu_ram_efficient_loading' is 1: allowed: true, false",
    ),
    (
        {"engine": {"name": "zero3", "deepspeed": {"zero_optimization": {"mics_shard_size": 8}}}},
        "mics_shard_size': newer DeepSpeed has no MiCS.*zero_hpz_partition_size",
    ),
    (
        {
            "quantization": {"load_in_4bit": True},
            "engine": {"name": "zero3", "deepspeed": {"zero_optimization": {"zero_quantized_weights": True}}},
        },
        "zero_quantized_weights' with 'quantization.load_in_4bit'",
    ),
    (
        {
            "engine": {
                "name": "zero3",
                "deepspeed": {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
            },
        },
        "zero_quantized_nontrainable_weights': frozen weights are stored by 'quantization'",
    ),
    (
        {"lora": {"trainable_token_indices": [1, 2]}},
        "'lora.trainable_token_indices' is refused.*modules_to_save",
    ),
    ({"engine": {"name": "zero3", "fsdp": FSDP}}, "'engine.fsdp' is given, but .* set 'engine.name' to \"fsdp2\""),
    ({"engine": {"name": "single", "fsdp": {}}}, "'engine.fsdp' is given, but 'engine.name' is \"single\""),
    ({"engine": {"name": "zero3", "deepspeed": {"zero_optimization": {"stage": 2}}}}, "stage' is 2: allowed: 3"),
    ({"engine": {"name": "zero3", "deepspeed": {"zero_optimization": True}}}, "zero_optimization' is true: allowed"),
    (
        {"engine": {"name": "zero3", "deepspeed": {"sparse_lora": {}}}},
        "'engine.deepspeed.sparse_lora' is not DeepSpeed's",
    ),
    ({"engine": {"name": "zero3", "deepspeed": "gone.json"}}, "'engine.deepspeed' is \"gone.json\": no such file"),
    (
        {"engine": {"name": "zero3", "deepspeed": {"x": [{"_target_": 1}]}}},
        "'engine.deepspeed.x\\[0\\]._target_' is refused",
    ),
    *[
        ({"engine": {"name": "fsdp2", "fsdp": {key: value}}}, f"'engine.fsdp.{key}[.'].*{words}")
        for key, value, words in [
            ("fsdp_version", 1, "is 1: allowed: 2"),
            ("fsdp_version", "auto", "allowed: 2"),
            ("fsdp_reshard_after_foward", True, "did you mean 'fsdp_reshard_after_forward'"),
            ("fsdp_reshard_after_forward", "FULL_SHARD", "allowed: true, false"),
            ("fsdp_sharding_strategy", "FULL_SHARD", "FSDP1.*fsdp_reshard_after_forward"),
            ("fsdp_state_dict_type", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"),
            ("fsdp_auto_wrap_policy", "NO_WRAP", "TRANSFORMER_BASED_WRAP"),
            ("fsdp_transformer_layer_cls_to_wrap", [], "a class name"),
            ("fsdp_mixed_precision_policy", "fp8", "bf16"),
            ("fsdp_mixed_precision_policy", {"param_dtyp": "bf16"}, "did you mean"),
            ("fsdp_mixed_precision_policy", {"param_dtype": "int8"}, "allowed"),
        ]
    ],
    # lora
    ({"lora": {"lora_alhpa": 16}}, "unknown key 'lora.lora_alhpa': did you mean 'lora_alpha'\\? known: alpha_pattern"),
    ({"lora": {"use_dora": True}}, "'lora.use_dora' is refused .true.: DoRA .*use plain LoRA"),
    ({"lora": {"megatron_core": "os"}}, "'lora.megatron_core' is refused .*module to import"),
    ({"lora": {"auto_mapping": {"parent_library": "os"}}}, "'lora.auto_mapping' is refused"),
    ({"lora": {"r": 0}}, "'lora.r' is 0: allowed: integers from 1"),
    ({"lora": {"r": "16"}}, "'lora.r' is \"16\": allowed: integers from 1"),
    ({"lora": {"lora_alpha": 0}}, "'lora.lora_alpha' is 0: allowed: numbers above 0"),
    ({"lora": {"lora_dropout": 1.0}}, "'lora.lora_dropout' is 1.0: allowed: numbers in \\[0, 1\\)"),
    ({"lora": {"target_modules": []}}, "'lora.target_modules' is \\[\\]: allowed: a list of module names"),
    ({"lora": {"task_type": "SEQ_CLS"}}, '\'lora.task_type\' is "SEQ_CLS": allowed: "CAUSAL_LM"'),
    ({"lora": {"init_lora_weights": "pissa"}}, "'lora.init_lora_weights' is \"pissa\": allowed: true, false"),
    ({"lora": {"bias": "all"}}, '\'lora.bias\' is "all": allowed: "none"'),
    ({"lora": {"trust_remote_code": False}}, "'lora.trust_remote_code' is refused"),
    ({"lora": 8}, "'lora' is 8: expected an object"),
    *[
        (
            {"sparse_base": {"enabled": True}, "quantization": {"format": name}},
            f"'quantization.format' is \"{name}\" with 'sparse_base.enabled': it has no code for zero",
        )
        for name in ("hqq", "bcq", "shiftadd", "billm")
    ],
    # LoftQ
    ({"lora": LOFTQ}, "\"loftq\", but the base is not quantised, .*: set 'quantization.format'"),
    (
        {"lora": LOFTQ, "quantization": {"format": "mxfp4"}},
        "with 'quantization.format' \"mxfp4\", whose matrices are read",
    ),
    ({"lora": LOFTQ, "quantization": {"format": "nvfp4"}}, "Use a format that is made here"),
    ({"lora": LOFTQ, "quantization": FP8, "sparse_base": {"enabled": True}}, "\"loftq\" with 'sparse_base.enabled'"),
    ({"lora": LOFTQ | {"init_from": "adapter"}, "quantization": BCQ3}, "both say what the adapter starts from"),
    ({"lora": LOFTQ | {"use_dora": True}, "quantization": BCQ3}, "'lora.use_dora' is refused"),
    (
        {"lora": LOFTQ | {"loftq_config": {"loftq_bits": 4}}, "quantization": BCQ3},
        "'lora.loftq_config.loftq_bits' is 4, but 'quantization' stores bcq in 3 bits",
    ),
    (
        {"lora": LOFTQ | {"loftq_config": {"loftq_iter": 0}}},
        "'lora.loftq_config.loftq_iter' is 0: allowed: integers from 1",
    ),
    (
        {"lora": LOFTQ | {"loftq_config": {"loftq_iters": 2}}},
        "'lora.loftq_config.loftq_iters'.*did you mean 'loftq_iter'",
    ),
    ({"lora": {"loftq_config": {"loftq_iter": 2}}}, "'lora.loftq_config' is .* not \"loftq\": remove it"),
    ({"lora": LOFTQ | {"target_parameters": ["mlp.experts.gate_up_proj"]}}, "'lora.target_parameters' is .* experts"),
]


@pytest.mark.parametrize(("sections", "words"), REFUSED)
def test_refusals(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**sections)


def test_loftq_is_ours_and_not_pefts() -> None:
    lora = run(lora=LOFTQ, quantization=BCQ3).lora
    assert (lora.loftq_rounds, lora.values["loftq_config"]) == (1, {"loftq_iter": 1})
    assert (lora.build().init_lora_weights, lora.build().loftq_config) == (True, {})
    rounds = {"loftq_config": {"loftq_iter": 3, "loftq_bits": 3}}
    config = run(lora=LOFTQ | rounds, quantization=BCQ3)
    assert config.lora.loftq_rounds == 3 and RunConfig.from_dict(config.to_dict()) == config
    assert run().lora.loftq_rounds == 0


def test_a_model_path_may_go_up_where_it_exists(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(model={"name_or_path": "../models/small"}).model.name_or_path == "../models/small"
    with pytest.raises(ConfigError, match="this one does not"):
        run(model={"name_or_path": "../models/large"})


def test_by_hand_is_checked_as_from_a_file() -> None:
    config = run(_comment="a note")
    with pytest.raises(
        ConfigError, match=r"'train.max_steps' is .3.: expected an integer or -1; write 3, without quotes"
    ):
        replace(config.train, max_steps="3")
    with pytest.raises(ConfigError, match=r"unknown key 'train.max_step': did you mean 'max_steps'"):
        TrainSection(output_dir="x", max_step=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"missing key 'train.output_dir': expected a string"):
        TrainSection()  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"'train' is {}: expected a TrainSection"):
        replace(config, train={})
    with pytest.raises(ConfigError, match=r"'train.output_dir' is PurePosixPath.*: expected JSON data"):
        run(train={"output_dir": PurePosixPath("runs")})
    with pytest.raises(FrozenInstanceError):
        config.train.seed = 3  # type: ignore[misc]
    again = replace(config, train=replace(config.train, learning_rate=1))
    assert (again.comment, again.train.learning_rate, type(again.train.learning_rate)) == ("a note", 1.0, float)
    for settings in ({"x": [float("inf")]}, {"x": {"_target_": "os.system"}}):
        with pytest.raises(ConfigError, match=r"'engine.deepspeed.x"):
            EngineSection(name="zero3", deepspeed=settings)


def test_the_schema_of_a_file_is_read_past() -> None:
    assert RunConfig.from_dict({"$schema": "schema.json", **MINIMAL}) == run()
    with pytest.raises(ConfigError, match=r"unknown key 'train\.\$schema'"):
        run(train={"$schema": "schema.json"})


def test_trackers_and_optimizers() -> None:
    assert run(train={"report_to": ["wandb", "none", "aim", "wandb"]}).train.trackers == ("wandb", "aim")
    assert run(train={"report_to": "all"}).train.trackers == ("all",)
    train = run(train={"run_name": "first", "logging_dir": "logs", "optim": "adamw_8bit"}).train
    assert (train.run_name, train.logging_dir, train.optim) == ("first", "logs", "adamw_8bit")
    assert (run().train.run_name, run().train.logging_dir, run().train.optim) == (None, None, None)
    known = set(get_args(Tracker)) - {"none", "all"}
    assert known == set(pytest.importorskip("accelerate.tracking").LOGGER_TYPE_TO_CLASS)


def test_deepspeed_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO))
    engine = EngineSection(name="zero3", deepspeed=str(path))
    assert engine.deepspeed_config() == ZERO and engine.to_dict()["deepspeed"] == str(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    with pytest.raises(ConfigError, match=r"'engine.deepspeed.zero_optimization.stage' is 1"):
        EngineSection(name="zero3", deepspeed=str(path))
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigError, match=r"ds\.json: line 1, column 10: the key 'a' is given twice"):
        EngineSection(name="zero3", deepspeed=str(path))
    assert EngineSection(name="zero3").deepspeed_config() == {}


def test_engine_settings_are_the_callers_own_and_auto_is_unset() -> None:
    engine = EngineSection(name="zero3", deepspeed={**ZERO, "sparse_attention": {"mode": "fixed"}})
    engine.deepspeed_config()["zero_optimization"]["stage"] = 0
    assert engine.deepspeed_config()["zero_optimization"]["stage"] == 3
    assert engine.deepspeed_config()["sparse_attention"] == {"mode": "fixed"}
    fsdp = {"fsdp_version": 2, "fsdp_offload_params": "auto", "fsdp_reshard_after_forward": False}
    assert EngineSection(name="fsdp2", fsdp=fsdp).fsdp_options() == {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": False,
    }
    assert EngineSection(name="fsdp2").fsdp_options() == {}


def test_lora_builds_what_peft_would() -> None:
    peft = pytest.importorskip("peft")
    built = LoraSection.from_dict({"r": 4, "rank_pattern": {"q_proj": 2}, "use_dora": False, "lora_dropout": 0}).build()
    assert isinstance(built, peft.LoraConfig)
    assert (built.r, built.lora_alpha, built.task_type, built.rank_pattern) == (4, 32, "CAUSAL_LM", {"q_proj": 2})
    assert built.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"} and built.use_dora is False
    section = LoraSection()
    section.to_dict()["target_modules"].append("x")
    assert (
        LoraSection().values["target_modules"]
        == ["q_proj", "k_proj", "v_proj", "o_proj"]
        == section.values["target_modules"]
    )
    with pytest.raises(ConfigError, match=r"'lora' is refused by PEFT: "):
        LoraSection(values={"layers_pattern": "h", "target_modules": ["q_proj"]}).build()
