"""The streamed model is from_pretrained's, bit for bit; of its files a rank reads its own part and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora
from sparselora_dist.codecs import NF4Codec, PlainCodec
from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.engines.zero3 import FlatShards
from sparselora_dist.io.adapter import is_adapted
from sparselora_dist.io.load import LoadedBase, load_base
from sparselora_dist.io.memory import InsufficientMemoryError, check_fits
from sparselora_dist.io.prequantized import PrequantizedError
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.sharding.placement import Placement, RowShards
from support.merging import BLOCKS, edit_json, load, logits, save_base
from support.models import ALL_LINEAR, ATTENTION, FAMILIES

CPU = torch.device("cpu")
NF4 = QuantizationSection(load_in_4bit=True)
TURNED = ("o_proj", "down_proj")
LAYERS = {"ffn": {"0-2": 0.5}, "qk": {"1-2": 0.5}, "vo": {"0-1": 0.5}}


def stream(
    folder: Path,
    dtype: str = "float32",
    quantization: QuantizationSection | None = None,
    placement: Placement | None = None,
    whole: Callable[[str], bool] = lambda name: False,
) -> LoadedBase:
    section = ModelSection(name_or_path=str(folder), dtype=dtype)
    return load_base(section, quantization or QuantizationSection(), placement or Placement(CPU), whole=whole)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("base"), shard="60KB", **BLOCKS)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", [None, "40KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_equals_from_pretrained(tmp_path: Path, family: str, dtype: str, shard: str | None, tied: bool) -> None:
    save_base(tmp_path, shard, family=family, tie_word_embeddings=tied)
    model = stream(tmp_path, dtype).model
    expected = load(tmp_path, getattr(torch, dtype))
    assert torch.equal(logits(model), logits(expected))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert all(p.device == CPU and p.dtype == getattr(torch, dtype) for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for layer, plain in zip(decoder_layers(model), decoder_layers(expected)):
        for name in ALL_LINEAR:
            linear, reference = layer.matrix(name), plain.matrix(name)
            assert isinstance(linear, FrozenLinear) and isinstance(linear.codec, PlainCodec)
            assert linear.transposed == (name in TURNED)
            stored = reference.weight.t() if name in TURNED else reference.weight
            assert torch.equal(linear.rows, stored) and linear.rows.is_contiguous()
            assert (linear.bias is None) == (reference.bias is None)


def test_a_checkpoint_in_another_dtype_is_cast(tmp_path: Path) -> None:
    save_base(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(stream(tmp_path, "float32").model), logits(load(tmp_path)))


@pytest.mark.parametrize("quantization", [QuantizationSection(), NF4], ids=["plain", "nf4"])
def test_a_base_model_saved_without_its_head(tmp_path: Path, quantization: QuantizationSection) -> None:
    """AutoModel's names have no "model." in front; the tied head needs no tensor of its own."""
    save_base(tmp_path / "whole", tie_word_embeddings=True, **BLOCKS)
    load(tmp_path / "whole").model.save_pretrained(tmp_path / "base")
    assert "layers.0.mlp.up_proj.weight" in TensorFiles.of_model(tmp_path / "base").tensors
    whole, alone = (stream(tmp_path / name, quantization=quantization) for name in ("whole", "base"))
    assert torch.equal(logits(alone.model), logits(whole.model))
    assert torch.equal(alone.weights.get(1, "o_proj"), whole.weights.get(1, "o_proj"))


def test_generation_config_is_kept(tmp_path: Path) -> None:
    save_base(tmp_path)
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[2, 7]).save_pretrained(tmp_path)
    kept = stream(tmp_path).model.generation_config
    assert (kept.temperature, kept.do_sample, kept.eos_token_id) == (0.3, True, [2, 7])
    (tmp_path / "generation_config.json").unlink()
    assert stream(tmp_path).model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [BLOCKS, {}], ids=["whole blocks", "padded rows"])
def test_nf4_computes_with_the_roundtripped_matrices(tmp_path: Path, shape: dict[str, int], double_quant: bool) -> None:
    save_base(tmp_path, **shape)
    loaded = stream(
        tmp_path, quantization=QuantizationSection(load_in_4bit=True, bnb_4bit_use_double_quant=double_quant)
    )
    expected, codec = load(tmp_path), NF4Codec(double_quant=double_quant)
    for layer, mine in zip(decoder_layers(expected), decoder_layers(loaded.model)):
        for name in ALL_LINEAR:
            weight = layer.matrix(name).weight
            stored = codec.roundtrip(weight.data.t().contiguous() if name in TURNED else weight.data)
            weight.data = stored.t().contiguous() if name in TURNED else stored
            linear: Any = mine.matrix(name)
            assert linear.codec == codec and all(p.dtype == torch.uint8 for p in linear.parts)
            assert torch.equal(linear.matrix(linear.parts, torch.float32), weight)
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=1e-6, atol=1e-6)
    assert loaded.report.kept_bytes == sum(p.nbytes for p in loaded.model.parameters())


@pytest.mark.parametrize(
    ("name", "remedy"), [("billm", "'sparselora-dist quantize' makes"), ("nvfp4", "name a checkpoint")]
)
def test_a_format_that_no_load_makes(base: Path, name: str, remedy: str) -> None:
    with pytest.raises(
        PrequantizedError, match=rf"'quantization.format' is \"{name}\", which .* is not quantised: {remedy}"
    ):
        stream(base, quantization=QuantizationSection(format=name))


def test_weights_for_the_factors_are_the_models(base: Path) -> None:
    """NF4: what the estimator scores with is what is computed with, where the rows are scored (q ... up)."""
    loaded = stream(base, quantization=NF4)
    for layer in decoder_layers(loaded.model):
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            linear: Any = layer.matrix(name)
            assert torch.equal(loaded.weights.get(layer.index, name), linear.matrix(linear.parts, torch.float32))


# --- what it is used for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [QuantizationSection(), NF4], ids=["plain", "nf4"])
def test_remove_sparselora_gives_back_the_streamed_model(base: Path, quantization: QuantizationSection) -> None:
    loaded = stream(base, quantization=quantization)
    before = logits(loaded.model)
    modules = {name: type(module) for name, module in loaded.model.named_modules()}
    apply_sparselora(loaded.model, SparseLoRAConfig(layers=LAYERS, rank=4), weights=loaded.weights)
    remove_sparselora(loaded.model)
    assert torch.equal(logits(loaded.model), before)
    assert {name: type(module) for name, module in loaded.model.named_modules()} == modules


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        {"target_modules": [*ALL_LINEAR, "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": "all-linear"},
    ],
    ids=["head copied", "embedding adapted", "embedding and norm copied", "all-linear"],
)
def test_peft_on_top(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    """The adapter that it trains loads in plain PEFT on from_pretrained's model, with the same logits."""
    save_base(tmp_path / "base", tie_word_embeddings=tied, **BLOCKS)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    loaded = stream(tmp_path / "base", whole=lambda name: is_adapted(config, name))
    model = get_peft_model(loaded.model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    plain = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model.eval()), logits(plain), rtol=1e-6, atol=1e-6)


# --- what is read -----------------------------------------------------------------------------------------------------


def row_shards(rank: int, size: int) -> Placement:
    return RowShards(CPU, rank, size)


class Flat(FlatShards):
    """ZeRO-3's split, without DeepSpeed."""

    def __init__(self, rank: int, size: int) -> None:
        Placement.__init__(self, CPU, rank, size)

    def parameter(self, rows: Tensor, start: int, shape: torch.Size) -> nn.Parameter:
        return RowShards.parameter(self, rows, start, shape)  # type: ignore[arg-type]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Values read by tensor name."""
    seen: dict[str, int] = {}
    for method in ("read", "read_columns"):
        original = getattr(TensorFiles, method)

        def read(self: TensorFiles, name: str, *part: slice, original: Callable[..., Tensor] = original) -> Tensor:
            got = original(self, name, *part)
            seen[name] = seen.get(name, 0) + got.numel()
            return got

        monkeypatch.setattr(TensorFiles, method, read)

    def get(self: TensorFiles, name: str) -> Tensor:
        raise AssertionError(f"{name} was asked for whole")

    monkeypatch.setattr(TensorFiles, "get", get)
    yield seen


@pytest.mark.parametrize("kind", [row_shards, Flat], ids=["rows", "flat"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "nf4"])
def test_a_rank_reads_its_own_part(
    base: Path, reads: dict[str, int], kind: Callable[..., Placement], size: int, four_bit: bool
) -> None:
    tensors = {name: info.shape for name, info in TensorFiles.of_model(base).tensors.items()}
    total = dict.fromkeys(tensors, 0)
    for rank in range(size):
        placement = kind(rank, size)
        # Alone there is nobody to exchange with: the mean of absmax is another, which is not looked at here.
        placement.share = lambda rows, widths: lambda mine: mine.new_zeros(rows, mine.shape[1])  # type: ignore[method-assign]
        reads.clear()
        loaded = stream(base, quantization=NF4 if four_bit else None, placement=placement)
        assert set(reads) == set(tensors)
        for name, shape in tensors.items():
            matrix = len(shape) == 2 and "embed" not in name and "lm_head" not in name
            channel = shape[1] if matrix and name.split(".")[-2] in TURNED else shape[0]
            whole = torch.Size(shape).numel()
            # Whole rows: one that two ranks share is read by both.
            assert reads[name] <= whole / size + 2 * whole / channel, name
            total[name] += reads[name]
        held = [p for p in loaded.model.parameters() if not p.is_meta]
        assert not held, "a tensor is held whole"
    for name, shape in tensors.items():
        assert torch.Size(shape).numel() <= total[name] <= 1.2 * torch.Size(shape).numel() + 2 * size * max(shape), name


def test_what_peft_copies_is_whole_on_every_rank(base: Path) -> None:
    model = stream(base, placement=row_shards(1, 2), whole=lambda name: name == "lm_head").model
    assert torch.equal(model.lm_head.weight, TensorFiles.of_model(base).read("lm_head.weight"))
    assert model.model.embed_tokens.weight.is_meta


def test_a_tied_head_that_peft_copies_is_whole(tmp_path: Path) -> None:
    save_base(tmp_path, tie_word_embeddings=True)
    model = stream(tmp_path, placement=row_shards(1, 2), whole=lambda name: name == "lm_head").model
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta


def test_more_ranks_than_rows(base: Path) -> None:
    """Ranks without rows of a tensor load nothing of it."""
    placement = row_shards(40, 41)
    placement.share = lambda rows, widths: lambda mine: mine.new_ones(rows, mine.shape[1])  # type: ignore[method-assign]
    loaded = stream(base, quantization=NF4, placement=placement)
    linear: Any = decoder_layers(loaded.model)[0].matrix("k_proj")
    assert linear.codes.shape[0] and linear.codes.shard_rows.shape[0] == 0
    assert loaded.report.kept_bytes < 10_000


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in shards that may be damaged; nothing of it may be kept."""

    def parameter(*_: Any) -> nn.Parameter:
        raise AssertionError("something was kept")

    monkeypatch.setattr(Placement, "parameter", parameter)
    return save_base(tmp_path, shard="40KB")


def refused(folder: Path, *parts: str, **options: Any) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        stream(folder, **options)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_a_missing_shard(damaged: Path) -> None:
    shard = sorted(damaged.glob("*.safetensors"))[2]
    shard.unlink()
    refused(damaged, str(damaged), shard.name)


def test_no_weights_at_all(damaged: Path) -> None:
    for path in damaged.glob("model*"):
        path.unlink()
    (damaged / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(damaged, str(damaged), "model.safetensors", "pickled weights are never loaded")


@pytest.mark.parametrize("end", [-1, 100, 4, 0])
def test_a_truncated_shard(damaged: Path, end: int) -> None:
    shard = sorted(damaged.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:end])
    refused(damaged, str(shard), "truncated")


def test_a_shard_with_bytes_too_many(damaged: Path) -> None:
    shard = sorted(damaged.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes() + b"\0")
    refused(damaged, str(shard), "longer than it should be")


@pytest.mark.parametrize("outside", ["../model.safetensors", "/tmp/model.safetensors", "model.bin"])
def test_an_index_that_points_outside(damaged: Path, outside: str) -> None:
    index = damaged / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=names | {"model.norm.weight": outside})
    refused(damaged, str(index), outside)


def test_an_index_that_is_wrong(damaged: Path) -> None:
    index = damaged / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={k: v for k, v in names.items() if k != "model.norm.weight"})
    refused(damaged, str(index), "model.norm.weight")
    edit_json(index, weight_map=names | {"model.extra": names["model.norm.weight"]})
    refused(damaged, "model.extra", names["model.norm.weight"])
    index.write_text("{")
    refused(damaged, str(index), "not JSON")


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("intermediate_size", 96, "model.layers.0.mlp.gate_proj.weight"),
        ("vocab_size", 100, "model.embed_tokens.weight"),
        ("num_hidden_layers", 4, "model.layers.3.self_attn.q_proj.weight"),
        ("attention_bias", True, "model.layers.0.self_attn.q_proj.bias"),
    ],
)
@pytest.mark.parametrize("quantization", [QuantizationSection(), NF4], ids=["plain", "nf4"])
def test_a_config_of_another_model(
    damaged: Path, key: str, value: Any, tensor: str, quantization: QuantizationSection
) -> None:
    edit_json(damaged / "config.json", **{key: value})
    refused(damaged, str(damaged), tensor, quantization=quantization)


def test_too_little_memory(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselora_dist.io.memory.free_bytes", lambda *_: 10_000_000)
    with pytest.raises(InsufficientMemoryError) as caught:
        check_fits(140_000_000_000, CPU, local_ranks=4, rank=3)
    for part in ("rank 3", "140.00 GB", "on cpu", "0.01 GB are free", "more ranks", "load_in_4bit true", "plan"):
        assert part in str(caught.value)
    needed = []
    monkeypatch.setattr("sparselora_dist.io.load.check_fits", lambda *given: needed.append(given[0]))
    with pytest.raises(AssertionError, match="something was kept"):
        stream(damaged)
    assert needed == [sum(p.nbytes for p in load(damaged).parameters())]
    monkeypatch.undo()
    monkeypatch.setattr("sparselora_dist.io.memory.free_bytes", lambda *_: needed[0] - 1)
    refused(damaged, "rank 0 would keep", "GB of frozen weights on cpu")


def test_a_matrix_with_nan(base: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    refused(tmp_path, str(tmp_path), "model.layers.1.mlp.down_proj.weight", "NaN or Inf", quantization=NF4)


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.down_proj.weight", "layers.2.input_layernorm.weight", "embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_with_nan_in_bf16(base: Path, tmp_path: Path, name: str, value: float) -> None:
    """Named with its file when it is read: nothing behind it could say where a NaN is from."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.get_submodule("model").get_parameter(name).data.view(-1)[7] = value
    model.save_pretrained(tmp_path)
    refused(tmp_path, str(tmp_path / "model.safetensors"), f"model.{name}", "holds NaN or Inf")


def test_4_bit_without_bitsandbytes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselora_dist.io.load.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes.*sparselora-dist\[quantization\]"):
        stream(base, quantization=NF4)
