"""Routed experts streamed from files, one matrix or two an expert, or one tensor: bit for bit what those hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.codecs import NF4Codec
from sparselora_dist.config import QuantizationSection
from sparselora_dist.config.run import ModelSection
from sparselora_dist.io.load import load_base
from sparselora_dist.io.manifest import CorruptFileError
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.io.weights import ModelWeights
from sparselora_dist.layouts import BY_ROWS, decoder_layers
from sparselora_dist.method.channels import EXPERTS
from sparselora_dist.sharding.placement import Placement, RowShards, waiting_rows
from support.every_type import tiny_model

FAMILIES = {
    "qwen3_moe": ".experts.3.up_proj.weight",
    "mixtral": ".experts.3.w3.weight",
    "gpt_oss": ".experts.down_proj",
}
"""With the end of a name that the files use."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).bfloat16().save_pretrained(path)
    assert any(name.endswith(FAMILIES[request.param]) for name in TensorFiles.of_model(path).tensors)
    return path


def loaded(folder: Path, placement: Placement, four_bit: bool = False) -> Any:
    section = ModelSection(name_or_path=str(folder), dtype="bfloat16")
    return load_base(section, QuantizationSection(load_in_4bit=four_bit), placement)


def matrices(base: Any) -> dict[str, Any]:
    return {
        f"{layer.index}.{name}": matrix
        for layer in decoder_layers(base.model)
        if layer.experts
        for name, matrix in layer.experts.module.__dict__[BY_ROWS].items()
    }


def expected(folder: Path) -> dict[str, Tensor]:
    """Rows of channels of what Transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", attn_implementation="eager")
    found = {}
    for layer in decoder_layers(model):
        if layer.experts:
            module = layer.experts.module
            found[f"{layer.index}.gate_up_proj"] = layer.experts.gate_up_rows(module.gate_up_proj.data)
            found[f"{layer.index}.down_proj"] = layer.experts.down_rows(module.down_proj.data)
    return found


def test_every_value_is_the_files(folder: Path) -> None:
    rows = expected(folder)
    base = loaded(folder, Placement(CPU))
    stored = matrices(base)
    assert stored.keys() == rows.keys() and len(stored) > 4
    assert all(torch.equal(stored[name].rows, rows[name]) for name in rows)
    # Cut up for three ranks of FSDP2, in the middle of an expert.
    parts = [matrices(loaded(folder, RowShards(CPU, rank, 3))) for rank in range(3)]
    for name, whole in rows.items():
        assert torch.equal(torch.cat([waiting_rows(part[name].rows) for part in parts]), whole), name


def test_codes_are_those_of_the_whole_matrix(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rows, codec = expected(folder), NF4Codec()
    base = loaded(folder, Placement(CPU), four_bit=True)
    for name, matrix in matrices(base).items():
        whole = codec.encode(rows[name].contiguous(), 0, lambda mine: mine)
        assert all(torch.equal(getattr(matrix, part), values) for part, values in whole.items()), name


@pytest.mark.parametrize("four_bit", [False, True], ids=["whole", "nf4"])
def test_factors_are_made_of_what_is_stored(folder: Path, four_bit: bool) -> None:
    if four_bit:
        pytest.importorskip("bitsandbytes")
    base = loaded(folder, Placement(CPU), four_bit)
    model = ModelWeights(base.model)
    layer = next(layer.index for layer in decoder_layers(base.model) if layer.experts)
    for name in EXPERTS:
        got = base.weights.get(layer, name)
        assert torch.equal(got, model.get(layer, name)) and got.shape == base.weights.shape(layer, name)
        assert base.weights.blocks(layer, name) == model.blocks(layer, name) == 4
    assert base.weights.mark(layer, EXPERTS[0]) != base.weights.mark(layer, EXPERTS[1])


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"4 and 3 experts for '.*\.2\.mlp\.experts\.gate_up_proj'.*asks for 4"):
        loaded(tmp_path, Placement(CPU))


def test_unloaded_it_is_the_family_s_model(folder: Path, tmp_path: Path) -> None:
    """A model that was loaded by rows, made sparse, merged and saved."""
    base = loaded(folder, Placement(CPU))
    model = get_peft_model(base.model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    sparse = SparseLoRAConfig.from_dict({"layers": {"experts": {"1": 0.5}}, "rank": 2})
    apply_sparselora(model, sparse, weights=base.weights)
    model.unload().save_pretrained(tmp_path / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
