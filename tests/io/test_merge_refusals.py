"""Nothing is merged unless base and adapter are whole, fit each other, and are what they say; the message says what not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparselora_dist.io import merge as module
from sparselora_dist.io.merge import merge_adapter
from support.merging import edit_json, make_adapter, save_base, tensors

Q = "base_model.model.model.layers.1.self_attn.q_proj"
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_base(folder / "base", shard="40KB")
    make_adapter(folder / "adapter", folder / "base", target_modules=["q_proj", "up_proj"])
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of a base and an adapter that may be damaged."""
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def refused(folder: Path, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        merge_adapter(folder / "base", folder / "adapter", folder / "out", **options)
    assert not {path.name for path in folder.iterdir()} - {"base", "adapter"}


# --- the adapter's config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["x"]),
        ("trainable_token_indices", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("megatron_config", {"a": 1}),
        ("a_variant_of_next_year", True),
    ],
)
def test_variants(folder: Path, key: str, value: Any) -> None:
    edit_json(folder / "adapter" / "adapter_config.json", **{key: value})
    refused(folder, rf"adapter_config.json: '{key}' is .*: only plain LoRA can be merged")


def test_other_methods_and_initialisations(folder: Path) -> None:
    config = folder / "adapter" / "adapter_config.json"
    edit_json(config, init_lora_weights="pissa_niter_4")
    refused(folder, r"adapter_config.json: 'init_lora_weights' is 'pissa_niter_4', which changes the base weights")
    edit_json(config, peft_type="IA3")
    refused(folder, r"adapter_config.json: 'peft_type' is 'IA3', only 'LORA'")
    config.write_text("{")
    refused(folder, r"adapter_config.json is not JSON")
    config.unlink()
    refused(folder, r"no such file: .*adapter_config.json", FileNotFoundError)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"r": 0}, "`r` should be a positive|rank is 0"),
        ({"r": "4"}, r"adapter_config.json: "),
        ({"rank_pattern": {"q_proj": -1}}, "rank is -1, expected a positive number"),
        ({"rank_pattern": {"q_proj": 3}}, r"expected \(3, 48\) for rank 3"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha is nan, expected a positive number"),
        ({"target_modules": "(q_proj"}, "adapter_config.json: missing"),
        ({"alpha_pattern": {"(q": 3}}, "adapter_config.json: missing"),
    ],
    ids=str,
)
def test_values_that_mean_nothing(folder: Path, values: dict[str, Any], match: str) -> None:
    edit_json(folder / "adapter" / "adapter_config.json", **values)
    refused(folder, match)


# --- the adapter's tensors -------------------------------------------------------------------------------------------

ADAPTER: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("no B", lambda t: t.pop(f"{Q}.lora_B.weight"), rf"{FILE}: {Q}.lora_B.weight is missing"),
    ("no A", lambda t: t.pop(f"{Q}.lora_A.weight"), rf"{FILE}: {Q}.lora_A.weight is missing"),
    (
        "a module is missing",
        lambda t: [t.pop(f"{Q}.lora_{letter}.weight") for letter in "AB"],
        r"is not whole: 'model.layers.1.self_attn.q_proj' is one of 'target_modules'",
    ),
    (
        "A of another base",
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 47)}),
        rf"'{Q}.lora_A.weight' has shape \(4, 47\), expected \(4, 48\) for rank 4",
    ),
    (
        "transposed B",
        lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(4, 48)}),
        rf"'{Q}.lora_B.weight' has shape \(4, 48\), expected \(48, 4\)",
    ),
    ("integers", lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 48).int()}), "is stored as I32"),
    (
        "a layer too many",
        lambda t: t.update({f"{Q.replace('1', '7')}.lora_{x}.weight": torch.zeros(48, 48) for x in "AB"}),
        r"belongs to nothing in the base model \(no tensor 'model.layers.7.self_attn.q_proj.weight'\)",
    ),
    (
        "not a target",
        lambda t: t.update(
            {
                f"{Q.replace('q_proj', 'o_proj')}.lora_{x}.weight": torch.zeros(*shape)
                for x, shape in (("A", (4, 48)), ("B", (48, 4)))
            }
        ),
        r"has tensors for 'model.layers.1.self_attn.o_proj', which 'target_modules'",
    ),
    (
        "no prefix",
        lambda t: t.update({"x.lora_A.weight": torch.zeros(4, 48)}),
        "does not start with 'base_model.model.'",
    ),
    (
        "an unknown tensor",
        lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 48)}),
        r"'base_model.model.score.weight' belongs to nothing in the base model",
    ),
    (
        "a resized embedding",
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(97, 48)}),
        r"'base_model.model.lm_head.weight' has shape \(97, 48\), the base model's 'lm_head.weight' \(96, 48\)",
    ),
    (
        "DoRA without saying so",
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(48)}),
        rf"'{Q}.lora_magnitude_vector' is not plain LoRA",
    ),
    (
        "an adapted embedding",
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 96)}),
        r"embed_tokens.lora_embedding_A' is not plain LoRA of a linear layer",
    ),
    ("a bias", lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(48)}), "lora_bias.*the base layer has no bias"),
    (
        "NaN",
        lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")),
        r"'model.layers.1.self_attn.q_proj.weight' holds NaN",
    ),
    ("empty", lambda t: t.clear(), "is empty"),
]


@pytest.mark.parametrize(("change", "match"), [case[1:] for case in ADAPTER], ids=[case[0] for case in ADAPTER])
def test_adapter_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], match: str) -> None:
    contents = tensors(folder / "adapter")
    change(contents)
    save_file(contents, folder / "adapter" / FILE)
    refused(folder, match)


def test_modules_to_save_that_were_not_saved(folder: Path) -> None:
    edit_json(folder / "adapter" / "adapter_config.json", modules_to_save=["lm_head"])
    refused(folder, "lacks 'modules_to_save' 'lm_head'")


def test_adapter_files(folder: Path) -> None:
    file = folder / "adapter" / FILE
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, rf"{FILE} is truncated: its header describes \d+ bytes, the file has \d+")
    file.write_bytes(b"\x80\x02}q\x00.")
    refused(folder, rf"{FILE} is truncated or not a safetensors file. Pickle files are never loaded")
    file.unlink()
    refused(folder, rf"no such file: .*{FILE}", FileNotFoundError)
    shutil.rmtree(folder / "adapter")
    refused(folder, "--adapter .* is not a folder", FileNotFoundError)


# --- the base --------------------------------------------------------------------------------------------------------


def a_shard(folder: Path) -> Path:
    return sorted((folder / "base").glob("*.safetensors"))[1]


def test_base_files(folder: Path) -> None:
    shard = a_shard(folder)
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    refused(
        folder, rf"{shard.name} is truncated: its header describes {len(data)} bytes, the file has {len(data) - 100}"
    )
    shard.write_bytes(data + b"x")
    refused(folder, rf"{shard.name} is longer than it should be")
    shard.write_bytes(data[:8] + b"x" + data[9:])
    refused(folder, rf"{shard.name} has no valid safetensors header")
    shard.unlink()
    refused(folder, rf"names files that are not there: {shard.name}", FileNotFoundError)


def test_base_tensors(folder: Path) -> None:
    shard = a_shard(folder)
    whole = tensors(shard.parent)
    own = {name: t for name, t in whole.items() if name in _names(shard)}
    name = next(name for name in own if own[name].dim() == 2)
    out, inner = own[name].shape
    save_file(own | {name: own[name].t().contiguous()[:-1]}, shard)
    refused(
        folder, rf"{shard.name}: '{name}' has shape \({inner - 1}, {out}\), config.json asks for \({out}, {inner}\)"
    )
    save_file(own | {name: own[name].to(torch.float8_e4m3fn)}, shard)
    refused(folder, rf"'{name}' is stored as F8_E4M3, expected one of F64")
    save_file({other: t for other, t in own.items() if other != name}, shard)
    refused(folder, rf"{shard.name} does not hold '{name}', which model.safetensors.index.json says it does")
    save_file(own | {"extra": torch.zeros(2)}, shard)
    refused(folder, rf"index.json does not name 'extra', which {shard.name} holds")
    save_file(own | {"lm_head.weight": whole["lm_head.weight"]}, shard)
    if "lm_head.weight" not in own:
        refused(folder, r"'lm_head.weight' is in .* and in ")


def _names(shard: Path) -> set[str]:
    from sparselora_dist.io.shard_files import read_header

    return set(read_header(shard))


def test_base_index(folder: Path) -> None:
    index = folder / "base" / module.INDEX_FILE
    weight_map = json.loads(index.read_text())["weight_map"]
    for file in ("../model.safetensors", "/etc/passwd", "model.bin"):
        edit_json(index, weight_map=weight_map | {"lm_head.weight": file})
        refused(folder, rf"index.json names '{file}': expected .safetensors files of its own folder")
    edit_json(index, weight_map=[])
    refused(folder, "has no 'weight_map'")
    save_file({"x": torch.zeros(1)}, folder / "base" / "model.safetensors")
    refused(folder, "holds both model.safetensors and")
    index.unlink()
    refused(folder, "has no tensor .*, which its config.json asks for")
    (folder / "base" / "model.safetensors").unlink()
    (folder / "base" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(folder, "holds neither .* pickled weights are never loaded", FileNotFoundError)


def test_base_config(folder: Path) -> None:
    config = folder / "base" / "config.json"
    edit_json(config, model_type="t5")
    refused(folder, "model_type 't5'. is an encoder and a decoder")
    config.unlink()
    refused(folder, "no such file: .*config.json", FileNotFoundError)
    shutil.rmtree(folder / "base")
    refused(folder, "--base .* is not a folder; download the model first", FileNotFoundError)


def test_a_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    edit_json(base / "config.json", tie_word_embeddings=True)
    refused(tmp_path, "'tie_word_embeddings', but the files hold 'lm_head.weight' too")


def test_nan_in_a_4bit_base_is_named(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    shard = a_shard(folder)
    own = {name: t for name, t in tensors(folder / "base").items() if name in _names(shard)}
    name = next(name for name in own if "proj" in name)
    own[name][0, 0] = float("inf")
    save_file(own, shard)
    refused(folder, rf"{shard.name}: '{name}': .* holds NaN or Inf", load_in_4bit=True)


# --- the output ------------------------------------------------------------------------------------------------------


def test_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(folder, "dtype is 'int8', expected one of bfloat16", dtype="int8")
    with pytest.raises(FileExistsError, match="exists already"):
        merge_adapter(folder / "base", folder / "adapter", folder / "base")
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1000})
        patch.setattr(module.shutil, "disk_usage", lambda path: usage)
        refused(folder, r"has 1000 bytes free, the merged model needs \d+", OSError)
    contents = tensors(folder / "adapter")
    contents[f"{Q}.lora_A.weight"].fill_(1e6)
    save_file(contents, folder / "adapter" / FILE)
    refused(folder, "holds NaN or Inf after merging in torch.float16", dtype="float16")


def test_another_base_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        merge_adapter(folder / "base", folder / "adapter", folder / "same")
        assert not caplog.messages
        edit_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path="org/a-model")
        snapshot = folder / "models--org--a-model" / "snapshots" / "0123"
        shutil.copytree(folder / "base", snapshot)
        merge_adapter(snapshot, folder / "adapter", folder / "from the cache")
        assert not caplog.messages
        edit_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path="org/another-model")
        merge_adapter(folder / "base", folder / "adapter", folder / "other")
    (message,) = caplog.messages
    assert "org/another-model" in message and str(folder / "base") in message
