"""Checkpoints that bitsandbytes quantised: their bytes are kept where rows are channels, and made anew for o and down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparselora_dist.codecs import NF4Codec, PlainCodec
from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io.load import LoadedBase, load_base
from sparselora_dist.io.manifest import CorruptFileError
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.io.prequantized import PrequantizedError, stored_matrix
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.layouts import UnsupportedModelError, decoder_layers, matrix_name
from sparselora_dist.sharding.placement import Placement
from support.compare import sqnr
from support.every_type import tiny_model
from support.merging import BLOCKS, logits, make_adapter, save_base
from support.models import ALL_LINEAR

TURNED = ("o_proj", "down_proj")
FILE = "model.safetensors"


def quantized(folder: Path, source: Path, **options: Any) -> Path:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True} | options
    own(source, **settings).save_pretrained(folder)
    return folder


def own(source: Path, **settings: Any) -> Any:
    """Transformers' own 4-bit model. In training mode: in eval mode its CPU kernel rounds to bf16."""
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings) if settings else None
    given = {"quantization_config": config} if config else {}
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map={"": "cpu"}, **given).train()


def stream(folder: Path, double_quant: bool = True, four_bit: bool = True) -> LoadedBase:
    quantization = QuantizationSection(load_in_4bit=four_bit, bnb_4bit_use_double_quant=double_quant)
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    return load_base(section, quantization, Placement(torch.device("cpu")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("plain"), **BLOCKS)


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def checkpoint(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("nf4"), plain, bnb_4bit_use_double_quant=request.param)


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """A double quantised one that may be damaged."""
    return quantized(tmp_path, plain)


def is_double(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]


def decoded(tensors: dict[str, Tensor], key: str) -> Tensor:
    """A matrix by bitsandbytes' own reading of the file."""
    state = {name: t for name, t in tensors.items() if name.startswith(f"{key}.")}
    return bnb.dequantize_4bit(tensors[key], bnb.QuantState.from_dict(state, torch.device("cpu"))).float()


# --- what is loaded ---------------------------------------------------------------------------------------------------


def test_codes_and_scales_are_kept(checkpoint: Path) -> None:
    double, tensors = is_double(checkpoint), load_file(checkpoint / FILE)
    loaded = stream(checkpoint, double)
    codec = NF4Codec(double_quant=double)
    for layer in decoder_layers(loaded.model):
        for name in ALL_LINEAR:
            linear: Any = layer.matrix(name)
            assert linear.codec == codec and linear.transposed == (name in TURNED)
            key = f"model.{matrix_name(layer.index, name)}.weight"
            matrix, got = decoded(tensors, key), linear.matrix(linear.parts, torch.float32)
            assert torch.equal(loaded.weights.get(layer.index, name), matrix)
            if name in TURNED:
                assert torch.equal(got, codec.roundtrip(matrix.t().contiguous()).t())
                continue
            assert torch.equal(got, matrix)
            assert torch.equal(linear.codes.flatten(), tensors[key].flatten())
            count = linear.in_features // 64
            if double:
                assert torch.equal(linear.scales[:, :count].flatten(), tensors[f"{key}.absmax"])
            else:
                assert torch.equal(linear.scales.view(torch.float32).flatten(), tensors[f"{key}.absmax"])


def test_logits_are_close_to_transformers_own(checkpoint: Path, plain: Path) -> None:
    """Only o and down differ; quantised once more, they move the logits by less than quantisation itself did."""
    got, expected, exact = (
        logits(stream(checkpoint, is_double(checkpoint)).model),
        logits(own(checkpoint)),
        logits(own(plain)),
    )
    moved, quantisation = (got - expected).norm(), (expected - exact).norm()
    assert 0 < moved < quantisation


def test_with_o_and_down_as_stored_the_logits_are_transformers_own(checkpoint: Path) -> None:
    model, tensors = stream(checkpoint, is_double(checkpoint)).model, load_file(checkpoint / FILE)
    for layer in decoder_layers(model):
        for name, parent in (("o_proj", layer.module.self_attn), ("down_proj", layer.module.mlp)):
            weight = decoded(tensors, f"model.{matrix_name(layer.index, name)}.weight")
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            setattr(parent, name, linear)
    torch.testing.assert_close(logits(model), logits(own(checkpoint)), rtol=1e-5, atol=1e-5)


def test_what_the_second_quantisation_costs() -> None:
    """Normal weights at 20.7 dB, quantised again in the other direction: the noise all but doubles, 2.85 dB."""
    codec, matrix = NF4Codec(), torch.randn(1024, 1024) * 0.02
    once = codec.roundtrip(matrix)
    twice = codec.roundtrip(once.t().contiguous()).t()
    direct = codec.roundtrip(matrix.t().contiguous()).t()
    assert sqnr(matrix, direct) == pytest.approx(20.7, abs=0.1)
    assert sqnr(matrix, direct) - sqnr(matrix, twice) == pytest.approx(2.85, abs=0.05)


def test_matrices_that_were_left_as_they_are(plain: Path, tmp_path: Path) -> None:
    quantized(
        tmp_path,
        plain,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj"],
    )
    loaded = stream(tmp_path)
    left = set()
    for layer, exact in zip(decoder_layers(loaded.model), decoder_layers(own(plain))):
        for name in ALL_LINEAR:
            linear: Any = layer.matrix(name)
            if isinstance(linear.codec, PlainCodec):
                left.add((layer.index, name))
                assert torch.equal(linear.weight, exact.matrix(name).weight)
                assert torch.equal(loaded.weights.get(layer.index, name), exact.matrix(name).weight)
    assert left == {(1, "down_proj"), (2, "q_proj")}


# --- what is refused --------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


def test_another_double_quantisation(checkpoint: Path) -> None:
    double = is_double(checkpoint)
    with pytest.raises(PrequantizedError, match=f"bnb_4bit_use_double_quant {double}.*set the same in 'quantization'"):
        stream(checkpoint, not double)


def test_a_run_that_is_not_4_bit(checkpoint: Path) -> None:
    with pytest.raises(PrequantizedError, match=r"is 4-bit: set quantization.load_in_4bit true"):
        stream(checkpoint, is_double(checkpoint), four_bit=False)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"load_in_4bit": False, "load_in_8bit": True, "_load_in_4bit": False}, "quantised by 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'"),
        ({"quant_method": "awq", "bits": 4}, "quantised by 'awq'"),
    ],
)
def test_other_formats(copy: Path, values: dict[str, Any], says: str) -> None:
    edit_config(copy, **values)
    with pytest.raises(PrequantizedError) as caught:
        stream(copy)
    for part in (str(copy), "quantization_config in its config.json", says, "bf16 checkpoint"):
        assert part in str(caught.value)


def drop_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))


def test_a_config_that_says_nothing_of_it(checkpoint: Path, tmp_path: Path) -> None:
    """The tensors themselves are looked at too."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    drop_config(tmp_path)
    double = is_double(checkpoint)
    with pytest.raises(PrequantizedError, match=r"q_proj.weight of .* is 4-bit: set quantization.load_in_4bit true"):
        stream(tmp_path, double, four_bit=False)
    with pytest.raises(
        PrequantizedError, match=f"q_proj.weight of .* bnb_4bit_use_double_quant {double}: set the same"
    ):
        stream(tmp_path, not double)
    stream(tmp_path, double)


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax", ".nested_quant_map"])
@pytest.mark.parametrize("missing", [False, True], ids=["short", "missing"])
def test_tensors_that_are_too_short_or_missing(copy: Path, part: str, missing: bool) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(copy / FILE)
    tensors[key + part] = tensors[key + part][:-1].clone()
    if missing:
        del tensors[key + part]
    save_file(tensors, copy / FILE, {"format": "pt"})
    with pytest.raises(CorruptFileError) as caught:
        stream(copy)
    assert key + part in str(caught.value) and str(copy) in str(caught.value)


def test_another_8_bit_map(copy: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight.nested_quant_map"
    tensors = load_file(copy / FILE)
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, copy / FILE, {"format": "pt"})
    with pytest.raises(PrequantizedError, match="another 8-bit map"):
        stream(copy)


@pytest.mark.parametrize(("key", "value"), [("blocksize", 128), ("nested_blocksize", 128)])
def test_other_block_sizes(copy: Path, key: str, value: int) -> None:
    name = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
    tensors = load_file(copy / FILE)
    state = json.loads(bytes(tensors[name].tolist())) | {key: value}
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, copy / FILE, {"format": "pt"})
    with pytest.raises(PrequantizedError, match=r"q_proj.weight .* block sizes .*128"):
        stream(copy)


def test_a_rank_without_rows_gets_none(checkpoint: Path) -> None:
    found = stored_matrix(TensorFiles.of_model(checkpoint), "model.layers.0.self_attn.k_proj.weight")
    assert found is not None
    codes, scales = (found.part(name, found.shape[0], found.shape[0], transposed=False) for name in ("codes", "scales"))
    assert codes is not None and codes.shape == (0, found.shape[1] // 2)
    assert scales is not None and scales.shape[0] == 0


def test_a_mixture_is_not_merged_into_as_training_stored_it(tmp_path: Path) -> None:
    """Its experts are whole in the files, and a run encodes them when it loads them."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "plain")
    quantized(tmp_path / "nf4", tmp_path / "plain")
    make_adapter(tmp_path / "adapter", tmp_path / "plain", target_modules=["q_proj"])
    with pytest.raises(UnsupportedModelError, match="--load-in-4bit of a mixture of experts"):
        merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out", load_in_4bit=True)
