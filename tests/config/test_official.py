"""Both config formats of the official release, in full size, and what in them cannot be honoured."""

import json
import warnings
from typing import Any

import pytest

from sparselora_dist.config import ConfigError, SparseLoRAConfig, from_official, from_official_dict

ATTENTION = [*range(14, 20), *range(21, 24), *range(25, 30)]
LAYERS = {"ffn": {"3-30": 0.99}, "qk": {"14-19,21-23,25-29": 0.75}, "vo": {"14-19,21-23,25-29": 0.75}}
HEAD = 'start_step: 0.05\nmode: "svd_8"\nskip_output_tokens: True\nffn_sparsity: "ffn=0.99x28"\nqkvo_sparsity: "x"\n'


def entries(prefix: str, ffn: dict[int, float], attention: dict[int, float], layers: int = 32) -> dict[str, float]:
    out: dict[str, float] = {}
    for layer in range(layers):
        out[f"{prefix}layers.{layer}.mlp"] = ffn.get(layer, 0)
        out[f"{prefix}layers.{layer}.self_attn"] = attention.get(layer, 0)
    return out


def math_entries(prefix: str = "") -> dict[str, float]:
    return entries(prefix, dict.fromkeys(range(3, 31), 0.99), dict.fromkeys(ATTENTION, 0.75))


def yaml_text(head: str = HEAD) -> str:
    return f"\n#* General Settings\n{head}sparsity:\n" + "".join(f"  {k}: {v}\n" for k, v in math_entries().items())


def modes() -> dict[str, Any]:
    csr = entries("model.", dict.fromkeys(range(17, 31), 0.97), dict.fromkeys([n for n in ATTENTION if n > 16], 0.2))
    return {
        "base_model": "org/model",
        "predictor_rank": 8,
        "modes": {"o1": {"layer_sparsity": csr}, "o2": {"layer_sparsity": math_entries("model.")}},
    }


def test_yaml_of_32_layers(tmp_path: Any) -> None:
    path = tmp_path / "llama3-8b-math10k.yaml"
    path.write_text(yaml_text())
    expected = SparseLoRAConfig(rank=8, start_step=0.05, layers=LAYERS, lora_branch="dense")
    assert from_official(path) == SparseLoRAConfig.from_file(path) == SparseLoRAConfig.from_yaml(path) == expected
    assert expected.sparsity(32)["vo"] == dict.fromkeys(ATTENTION, 0.75)


def test_yaml_dense(tmp_path: Any) -> None:
    path = tmp_path / "dense.yaml"
    path.write_text('mode: "dense"\nsparsity:\n  layers.0.mlp: 0\n  layers.0.self_attn: 0\n')
    assert from_official(path) == SparseLoRAConfig(enabled=False)


def test_config_json_with_modes(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(modes()))
    o1 = from_official(path)
    assert o1.layers == {
        "ffn": {"17-30": 0.97},
        "qk": {"17-19,21-23,25-29": 0.2},
        "vo": {"17-19,21-23,25-29": 0.2},
    }
    assert (o1.rank, o1.start_step, o1.end_step, o1.enabled) == (8, 0.0, None, True)
    assert SparseLoRAConfig.from_file(path) == SparseLoRAConfig.from_json(path) == from_official(tmp_path) == o1
    assert from_official(path, mode="o2").layers == LAYERS
    assert SparseLoRAConfig.from_file(path, mode="o2") == SparseLoRAConfig.from_file(tmp_path, mode="o2")
    assert SparseLoRAConfig.from_file(tmp_path, mode="o2").layers == LAYERS
    with pytest.raises(ConfigError, match=r"config\.json: mode 'o3' is not in this file: available modes: o1, o2"):
        from_official(path, mode="o3")
    for data in ({"rank": 8}, {"mode": "svd_8", "sparsity": {"layers.3.mlp": 0.5}}):
        (tmp_path / "other.json").write_text(json.dumps(data))
        with pytest.raises(ConfigError, match=r"not an official|mode 'o2' was asked for, but this file has no 'modes'"):
            SparseLoRAConfig.from_file(tmp_path / "other.json", mode="o2")


def arguments() -> dict[str, Any]:
    """What the official program writes beside its adapter: its YAML, its defaults, settings of its trainer."""
    return {
        "sparsity": math_entries(),
        "current_step": 0,
        "start_step": 0.05,
        "mode": "svd_8",
        "skip_output_tokens": True,
        "ffn_sparsity": "ffn=0.99x28",
        "qkvo_sparsity": "qkv=0.75x14",
        "predictor_basepath": "./weights/",
        "skip_sink_tokens": 0,
        "skip_random_tokens": False,
        "end_step": 1,
        "sparse_lora_branch": False,
        "qk_per_head": False,
        "qkvo_seq_avg": False,
        "mlp_seq_avg": True,
        "sparse_output_tokens": 0,
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 8,
        "lora_target_modules": "q_proj,k_proj,v_proj,o_proj",
        "model_max_length": 512,
        "model_id": "org/model",
    }


def test_args_json_and_its_folder(tmp_path: Any) -> None:
    (tmp_path / "args.json").write_text(json.dumps(arguments()))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    expected = SparseLoRAConfig(rank=8, start_step=0.05, end_step=1.0, layers=LAYERS, lora_branch="dense")
    for path in (tmp_path / "args.json", tmp_path):
        with pytest.warns(UserWarning, match=r"'mlp_seq_avg': true.*every context token scores for itself"):
            assert SparseLoRAConfig.from_file(path) == expected
    (tmp_path / "args.json").write_text(json.dumps(arguments() | {"skip_output_tokens": False}))
    with pytest.raises(ConfigError, match=r"args\.json: 'skip_output_tokens' is false"):
        SparseLoRAConfig.from_file(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"empty.config\.json' cannot be read: there is none, and no args\.json beside it"
    ):
        SparseLoRAConfig.from_file(tmp_path / "empty")


def test_settings_of_a_mode_go_before_those_of_the_file() -> None:
    data = {**modes(), "start_step": 0.05, "end_step": 1}
    data["modes"]["o1"] |= {"start_step": 20, "predictor_rank": 4}
    o1 = from_official_dict(data)
    assert (o1.start_step, o1.rank) == (20, 4) and type(o1.start_step) is int
    o2 = from_official_dict(data, "o2")
    assert (o2.start_step, o2.end_step, o2.rank) == (0.05, 1.0, 8) and type(o2.end_step) is float  # up to 1: a fraction


def test_flat_form_and_adapter_branch() -> None:
    data = {
        "layer_sparsity": math_entries("model."),
        "predictor_rank": 8,
        "path": None,
        "start_step": 0,
        "end_step": 1.0,
    }
    config = from_official_dict(data)
    assert config.layers == LAYERS and config.lora_branch == "dense" and config.start_step == 0
    assert from_official_dict({**data, "sparse_lora_branch": False}).lora_branch == "dense"
    ffn = {"layer_sparsity": {"model.layers.3.mlp": 0.9, "model.layers.3.self_attn": 0}, "sparse_lora_branch": True}
    assert from_official_dict(ffn).lora_branch == "kept"
    refuse({**data, "sparse_lora_branch": True}, "'sparse_lora_branch' is true, and self_attn is sparse.*always whole")


@pytest.mark.parametrize("key", ["mlp_seq_avg", "qkvo_seq_avg"])
def test_averages_are_named(key: str) -> None:
    data = {"sparsity": {"layers.3.mlp": 0.9}}
    with pytest.warns(UserWarning, match=f"'{key}': true"):
        assert from_official_dict({**data, key: True}) == from_official_dict(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_official_dict({**data, key: False}) == from_official_dict(data)


def refuse(data: dict[str, Any], words: str, mode: str = "o1") -> None:
    with pytest.raises(ConfigError, match=f"^file.yaml: .*{words}"):
        from_official_dict(data, mode, source="file.yaml")


@pytest.mark.parametrize("mode", ["oracle_l2norm", "oracle_random_ffn", "random", "none", "svd_", "svd_x", None, 8])
def test_other_modes_are_refused_by_name(mode: Any) -> None:
    shown = json.dumps(mode)
    refuse({"mode": mode, "sparsity": {}}, f'\'mode\' is {shown}: supported: "svd_8".* and "dense"')


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"skip_output_tokens": False}, "'skip_output_tokens' is false: allowed: true: .*always dense here.*remove it"),
        ({"skip_output_tokens": 1}, "'skip_output_tokens' is 1: allowed: true"),
        ({"skip_sink_tokens": 4}, "'skip_sink_tokens' is 4: allowed: 0"),
        ({"skip_random_tokens": True}, "'skip_random_tokens' is true: allowed: false"),
        ({"strat_step": 0.1}, "unknown key 'strat_step': did you mean 'start_step'\\? known: "),
        ({"start_step": 1.5}, "'start_step' is 1.5: allowed: a fraction"),
        ({"start_step": -1}, "'start_step' is -1"),
        ({"start_step": "5%"}, "'start_step' is \"5%\""),
        ({"end_step": True}, "'end_step' is true"),
        ({"predictor_rank": 0}, "'predictor_rank' is 0: allowed: integers from 1"),
        ({"mode": "svd_8", "rank": 4}, "rank is given twice: 'mode' says 8, 'rank' says 4: keep one"),
        ({"mode": "svd_0"}, "'sparse_lora.rank' is 0"),
        ({"sparsity": {"layers.3.mlp": 1.0}}, "'sparsity.layers.3.mlp' is 1.0: allowed: a number in \\[0, 1\\)"),
        ({"sparsity": {"layers.3.mlp": "0.5"}}, "'sparsity.layers.3.mlp' is \"0.5\""),
        ({"sparsity": {"layers.3.mlp": float("nan")}}, "'sparsity.layers.3.mlp' is NaN"),
        ({"sparsity": {"layers.3.mpl": 0.5}}, "'sparsity' names \"layers.3.mpl\".*expected layers.N.mlp"),
        ({"sparsity": {"layers.../../etc.mlp": 0.5}}, "'sparsity' names \"layers.../../etc.mlp\", which is no layer"),
        ({"sparsity": {"../layers.3.mlp": 0.5}}, "which is no layer"),
        ({"sparsity": {"layers.3.mlp": 0.5, "model.layers.3.mlp": 0.5}}, "names layer 3 mlp twice"),
        ({"sparsity": [0.5]}, "'sparsity' is \\[0.5\\]: allowed: an object"),
        ({"layer_sparsity": {}}, "both 'sparsity' and 'layer_sparsity' are given"),
        ({"sparse_lora_branch": "yes"}, "'sparse_lora_branch' is \"yes\": allowed: true or false"),
        ({"trust_remote_code": True}, "'trust_remote_code' is refused"),
    ],
)
def test_refusals(extra: dict[str, Any], words: str) -> None:
    refuse({"sparsity": {"layers.3.mlp": 0.9}, **extra}, words)


def test_refusals_inside_modes() -> None:
    refuse({"modes": {}}, "'modes' is {}: allowed: an object")
    refuse({"modes": {"o1": [1]}}, "'modes.o1' is \\[1\\]: allowed: an object")
    refuse({"modes": {"o1": {}}}, "neither 'sparsity' nor 'layer_sparsity' is given for mode 'o1'")
    refuse(
        {"modes": {"o1": {"layer_sparsiti": {}}}},
        "unknown key 'modes.o1.layer_sparsiti': did you mean 'layer_sparsity'",
    )
    refuse({"modes": {"o1": {"layer_sparsity": {"x": 1}}}}, "'modes.o1.layer_sparsity' names \"x\"")
    refuse({"mode": "svd_8"}, "neither 'sparsity' nor 'layer_sparsity' is given")


def test_files_that_are_not_official(tmp_path: Any) -> None:
    (tmp_path / "ours.json").write_text(json.dumps({"rank": 8}))
    with pytest.raises(
        ConfigError, match=r"ours\.json: not an official SparseLoRA config \(its keys: rank\): expected"
    ):
        from_official(tmp_path / "ours.json")
    with pytest.raises(ConfigError, match=r"config\.json' cannot be read"):
        from_official(tmp_path)
    (tmp_path / "bad.yaml").write_text(yaml_text(HEAD.replace("True", "False")))
    with pytest.raises(ConfigError, match=r"bad\.yaml: 'skip_output_tokens' is false"):
        SparseLoRAConfig.from_file(tmp_path / "bad.yaml")
