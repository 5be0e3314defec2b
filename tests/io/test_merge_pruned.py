"""An adapter that was trained under a pruned model's zeros is merged under them: no zero is lost, in bf16 and in 4 bits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparselora_dist.codecs import NF4Codec
from sparselora_dist.codecs.nf4_files import file_tensors, nonzero_of_codes
from sparselora_dist.config.quantization import QuantizationSection
from sparselora_dist.config.run import ModelSection
from sparselora_dist.io.load import load_base
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.sharding.placement import Placement
from support.merging import BLOCKS, edit_json, load, logits, make_adapter, save_base, tensors
from support.pruned import PATTERNS, make_marked, mark, save_pruned

pytest.importorskip("bitsandbytes")

STATE = ".quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module", params=PATTERNS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned base, a marked adapter of it, and the base as Transformers quantises it."""
    folder = tmp_path_factory.mktemp(request.param.replace(":", "of"))
    base = save_pruned(folder / "base", request.param)
    make_marked(folder / "adapter", base)
    section = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=section)
    model.save_pretrained(folder / "nf4", max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    make_marked(folder / "adapter", save_pruned(folder / "base", "2:4"), target_modules=["q_proj", "down_proj"])
    return folder


def delta(adapter: Path, module: str) -> Tensor:
    found = load_file(adapter / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.{module}.lora_{letter}.weight"].float() for letter in "AB")
    return 2.0 * b @ a  # alpha 8 over rank 4


def modules(adapter: Path) -> list[str]:
    return json.loads((adapter / "adapter_config.json").read_text())["sparse_base"]["modules"]


def decoded(folder: Path) -> dict[str, Tensor]:
    """The matrices of a folder in 4 bits as plain Transformers has them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    from bitsandbytes.functional import dequantize_4bit

    return {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }


def test_every_zero_of_the_base_is_one_of_the_merged_model(made: Path, tmp_path: Path) -> None:
    """And everything else is (W + s·B·A), rounded once."""
    before = tensors(made / "base")
    summary = merge_adapter(made / "base", made / "adapter", tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert "merged 21 matrices, kept the zeros of 21 matrices" in str(summary)
    for module in modules(made / "adapter"):
        weight, merged = before[f"{module}.weight"], after[f"{module}.weight"]
        expected = (weight.float() + delta(made / "adapter", module)) * (weight != 0)
        torch.testing.assert_close(merged, expected.bfloat16(), rtol=2**-8, atol=1e-7)
        assert not merged[weight == 0].any() and (merged != 0).sum() >= 0.99 * (weight != 0).sum()
    # The same adapter without its mark is a plain one, and fills them.
    shutil.copytree(made / "adapter", tmp_path / "plain")
    edit_json(tmp_path / "plain" / "adapter_config.json", sparse_base=None)
    merge_adapter(made / "base", tmp_path / "plain", tmp_path / "filled")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (tensors(tmp_path / "filled")[name][before[name] == 0] != 0).double().mean() > 0.99


def test_what_was_trained_in_4_bits_has_the_zeros_of_its_codes(made: Path, tmp_path: Path) -> None:
    """Of a base that is quantised for training (o and down by column), and of one that bitsandbytes has quantised."""
    plain, codec = tensors(made / "base"), NF4Codec()
    merge_adapter(made / "base", made / "adapter", tmp_path / "own", load_in_4bit=True)
    own = tensors(tmp_path / "own")
    for module in modules(made / "adapter"):
        weight, turned = plain[f"{module}.weight"], module.endswith(("o_proj", "down_proj"))
        stored = codec.roundtrip(weight.t().contiguous()).t() if turned else codec.roundtrip(weight)
        expected = (stored.float() + delta(made / "adapter", module)) * (stored != 0)
        torch.testing.assert_close(own[f"{module}.weight"], expected.bfloat16(), rtol=2**-8, atol=1e-7)
        assert not own[f"{module}.weight"][weight == 0].any()
    files = tensors(made / "nf4")
    merge_adapter(made / "nf4", made / "adapter", tmp_path / "theirs")
    theirs = tensors(tmp_path / "theirs")
    for module in modules(made / "adapter"):
        name = f"{module}.weight"
        kept = nonzero_of_codes(files[name], plain[name].shape)
        assert not kept[plain[name] == 0].any() and not theirs[name][~kept].any()
        assert (theirs[name][kept] != 0).double().mean() > 0.99


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_merged_model_in_4_bits_is_what_transformers_makes_of_it(
    made: Path, tmp_path: Path, double_quant: bool
) -> None:
    """The same codes and scales; plain Transformers loads it; every pruned position decodes to zero; our own loading of
    quantised checkpoints takes it as it is."""
    merge_adapter(made / "base", made / "adapter", tmp_path / "bf16")
    summary = merge_adapter(
        made / "base", made / "adapter", tmp_path / "nf4", save_in_4bit=True, double_quant=double_quant
    )
    assert summary.quantized == 21 and "quantised 21 matrices to nf4" in str(summary)
    section = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16, quantization_config=section)
    theirs.save_pretrained(tmp_path / "theirs")
    got, expected = tensors(tmp_path / "nf4"), tensors(tmp_path / "theirs")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(STATE):
            ours, other = (json.loads(bytes(state.tolist())) for state in (got[name], tensor))
            assert ours == other, name
        else:
            assert tensor.dtype == got[name].dtype and torch.equal(tensor, got[name]), name
    index = json.loads((tmp_path / "nf4" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == got.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values()) == summary.size

    pruned, matrices = tensors(made / "base"), decoded(tmp_path / "nf4")
    assert len(matrices) == 21
    assert not any(matrix[pruned[name] == 0].any() for name, matrix in matrices.items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert torch.equal(logits(plain), logits(theirs))
    quantization = QuantizationSection(load_in_4bit=True, bnb_4bit_use_double_quant=double_quant)
    base = load_base(ModelSection(name_or_path=str(tmp_path / "nf4")), quantization, Placement(torch.device("cpu")))
    q = base.model.get_submodule("model.layers.1.self_attn.q_proj")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(q.codes.view(-1), got[name].view(-1))
    again = merge_adapter(tmp_path / "nf4", made / "adapter", tmp_path / "again", save_in_4bit=True)
    assert again.dequantized == again.quantized == 21


def test_odd_shapes_in_4_bits_are_bitsandbytes_own() -> None:
    """Rows that share a block, a last block that is not full, an odd number of values."""
    from bitsandbytes.functional import quantize_4bit

    matrix = torch.randn(37, 21, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix[5:12] = 0
    codes, state = quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")
    ours, theirs = file_tensors("x", matrix, True), state.as_dict(packed=True)
    assert ours.pop("x").shape == codes.shape
    assert all(torch.equal(ours[f"x.{key}"], value) for key, value in theirs.items()) and len(ours) == len(theirs)
    kept = nonzero_of_codes(file_tensors("x", matrix, True)["x"], (37, 21))
    assert kept.shape == (37, 21) and not kept[5:12].any() and kept[:5].double().mean() > 0.8


def test_the_mask_is_read_from_codes_not_from_values(folder: Path, tmp_path: Path) -> None:
    """A block of weights too small for the output's dtype decodes to zeros that nobody pruned."""
    name = "model.layers.1.self_attn.q_proj.weight"
    merge_adapter(folder / "base", folder / "adapter", tmp_path / "nf4", save_in_4bit=True)
    path = (
        tmp_path
        / "nf4"
        / json.loads((tmp_path / "nf4" / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    weight = tensors(folder / "base")[name].clone()
    weight[7] *= 1e-10
    save_file(load_file(path) | file_tensors(name, weight, False), path, metadata={"format": "pt"})
    stale = load_file(path)
    for part in ("nested_absmax", "nested_quant_map"):
        stale.pop(f"{name}.{part}", None)
    save_file(stale, path, metadata={"format": "pt"})
    index = tmp_path / "nf4" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {key: file for key, file in data["weight_map"].items() if not key.startswith(f"{name}.nested")}
    index.write_text(json.dumps(data))
    merge_adapter(tmp_path / "nf4", folder / "adapter", tmp_path / "out", dtype="float16")
    row, kept = tensors(tmp_path / "out")[name][7], nonzero_of_codes(stale[name], (64, 64))[7]
    assert 0 < kept.sum() <= 32 and not row[~kept].any()
    assert (row[kept] != 0).double().mean() > 0.9, "what decodes to zero was taken for pruned"


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path, out: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        merge_adapter(base, adapter, out, **options)
    assert not out.exists()


def test_a_base_without_the_zeros_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """Dense, and dense in 4 bits, where 9 % of the codes are that of zero."""
    dense = save_base(tmp_path / "dense", dtype=torch.bfloat16, **BLOCKS)
    said = (
        r"adapter_config.json: 'sparse_base' says that the adapter was trained under the zeros of "
        r"'model.layers.0.mlp.down_proj', but .* of that matrix of .* are zero: it is not the pruned model"
    )
    refused(dense, folder / "adapter", tmp_path / "out", said)
    refused(dense, folder / "adapter", tmp_path / "out", said, load_in_4bit=True)
    make_adapter(tmp_path / "plain", dense, target_modules=["q_proj"])
    merge_adapter(dense, tmp_path / "plain", tmp_path / "nf4", save_in_4bit=True)
    refused(tmp_path / "nf4", folder / "adapter", tmp_path / "out", said)


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        (["model.layers.9.self_attn.q_proj"], "'model.layers.9.self_attn.q_proj', which the base model does not have"),
        (
            ["model.layers.0.mlp.up_proj"],
            "'model.layers.0.mlp.up_proj', which .*adapter_model.safetensors does not have",
        ),
    ],
)
def test_a_marked_module_that_is_nowhere_is_refused(
    folder: Path, tmp_path: Path, modules: list[str], match: str
) -> None:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    mark(tmp_path / "adapter", modules)
    refused(folder / "base", tmp_path / "adapter", tmp_path / "out", match)


@pytest.mark.parametrize(
    "value", [True, {"modules": []}, {"modules": "q_proj"}, {"modules": ["a"], "since": 2}], ids=str
)
def test_a_mark_that_is_none_is_refused(folder: Path, tmp_path: Path, value: Any) -> None:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", sparse_base=value)
    refused(folder / "base", tmp_path / "adapter", tmp_path / "out", "adapter_config.json: 'sparse_base' (is|has)")


def test_zeros_that_a_plain_adapter_fills_are_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The record of the pruning goes with a model that keeps its zeros, and not with one that does not."""
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base" / "pruning.json").write_text("{}")
    merge_adapter(tmp_path / "base", folder / "adapter", tmp_path / "kept")
    assert (tmp_path / "kept" / "pruning.json").read_text() == "{}" and not caplog.records
    make_adapter(tmp_path / "plain", tmp_path / "base", target_modules=["q_proj"])
    with caplog.at_level(logging.WARNING):
        merge_adapter(tmp_path / "base", tmp_path / "plain", tmp_path / "filled")
    assert "was not trained under its zeros" in caplog.text and not (tmp_path / "filled" / "pruning.json").exists()


def test_peft_loads_a_marked_adapter_and_names_the_mark(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['sparse_base'\]"):
        model = PeftModel.from_pretrained(load(folder / "base"), str(folder / "adapter"))
    assert model.peft_config["default"].r == 4
