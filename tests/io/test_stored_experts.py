"""Experts of checkpoints in fp8: codes and scales as the files hold them, shared by ranks, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io import shard_files
from sparselora_dist.io.load import load_base
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.io.prequantized import planned
from sparselora_dist.layouts import BY_ROWS, decoder_layers
from sparselora_dist.plan.shapes import from_hf_config
from sparselora_dist.plan.storage import resident_bytes
from sparselora_dist.sharding.placement import Placement, RowShards, waiting_rows
from support.every_type import tiny_model
from support.experts_workers import moe_config, run
from support.merging import load, make_adapter
from support.small_floats import FILE, KINDS, edit, encode_files

EXPERTS, WIDTH, HIDDEN = 6, 96, 64
READ = ("fp8 tensor", "fp8 channel", "mxfp8", "modelopt fp8", "modelopt fp8 block", "fine-grained", "autofp8", "fbgemm")
CPU = torch.device("cpu")


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = moe_config()
    config.moe_intermediate_size = WIDTH
    return Qwen3MoeForCausalLM(config)


def write(folder: Path, kind: str, left: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A mixture whose matrices are stored so; what they mean."""
    mixture().save_pretrained(folder)
    return encode_files(folder, kind, left)


def bank(folder: Path, kind: str, placement: Placement | None = None) -> dict[str, Any]:
    """The matrices of the last layer's experts, and the base they are of."""
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    base = load_base(section, QuantizationSection(format=KINDS[kind].format), placement or Placement(CPU))  # type: ignore[arg-type]
    experts = decoder_layers(base.model)[2].experts
    assert experts
    return experts.module.__dict__[BY_ROWS] | {"base": base}


def expected(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of channels, expert after expert."""
    of = {
        name: [means[f"model.layers.2.mlp.experts.{e}.{name}.weight"] for e in range(EXPERTS)]
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return {
        "gate_up_proj": torch.cat([m for pair in zip(of["gate_proj"], of["up_proj"]) for m in pair]),
        "down_proj": torch.cat([matrix.t() for matrix in of["down_proj"]]),
    }


@pytest.mark.parametrize("kind", READ)
def test_they_are_what_the_files_mean(kind: str, tmp_path: Path) -> None:
    """To the bit: all rows, rows of one expert and of several by number, and what the estimator is made of."""
    rows = expected(write(tmp_path, kind))
    found = bank(tmp_path, kind)
    for name, wanted in rows.items():
        matrix = found[name]
        assert matrix.codec.name == "fp8" and matrix.parts[0].dtype == torch.uint8
        assert torch.equal(matrix.rows_of(matrix.parts, torch.float32), wanted)
        some = torch.tensor([0, 3, WIDTH - 1, WIDTH, 4 * WIDTH + 7, len(wanted) - 1])
        assert torch.equal(matrix.stored.decode(some, torch.float32), wanted[some])
    both = rows["gate_up_proj"].view(EXPERTS, 2, WIDTH, HIDDEN)
    weights = found["base"].weights
    for number, name in enumerate(("experts.gate_proj", "experts.up_proj")):
        assert torch.equal(weights.get(2, name), both[:, number].flatten(0, 1))
    marks = {weights.mark(layer, name) for layer in (1, 2) for name in ("experts.gate_proj", "experts.up_proj")}
    assert len(marks) == 4


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_share_codes_and_scales(ranks: int, tmp_path: Path) -> None:
    write(tmp_path, "fine-grained")
    whole = bank(tmp_path, "fine-grained")
    shares = [bank(tmp_path, "fine-grained", RowShards(CPU, rank, ranks)) for rank in range(ranks)]
    for name in ("gate_up_proj", "down_proj"):
        for number, part in enumerate(whole[name].parts):
            own = [waiting_rows(share[name].parts[number]) for share in shares]
            assert torch.equal(torch.cat(own), part)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["fine-grained", None])
def test_files_are_opened_once_for_all_experts(
    kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open one is to read its whole header, which has every expert of every layer."""
    if kind:
        write(tmp_path, kind)
    else:
        mixture().save_pretrained(tmp_path)
    opened: list[str] = []

    def counted(path: Any, **options: Any) -> Any:
        opened.append(str(path))
        return safe_open(path, **options)

    section, form = ModelSection(name_or_path=str(tmp_path), dtype="float32"), KINDS[kind].format if kind else None
    monkeypatch.setattr(shard_files, "safe_open", counted)
    base = load_base(section, QuantizationSection(format=form), Placement(CPU))  # type: ignore[arg-type]
    others = [name for name in base.weights.checkpoint.tensors if ".experts." not in name]
    assert len(opened) <= 2 * len(others)
    opened.clear()
    base.weights.get(2, "experts.gate_proj")
    base.weights.mark(2, "experts.gate_proj")
    assert len(opened) == 2


def test_experts_that_were_left_as_they_are(tmp_path: Path) -> None:
    means = write(tmp_path, "fine-grained", left=("experts",))
    found = bank(tmp_path, "fine-grained")
    for name, wanted in expected(means).items():
        assert found[name].codec.name == "plain" and torch.equal(found[name].parts[0], wanted)


def test_a_merge_dequantises_them(tmp_path: Path) -> None:
    means = write(tmp_path / "base", "fine-grained")
    mixture().save_pretrained(tmp_path / "plain")
    make_adapter(tmp_path / "adapter", tmp_path / "plain", target_modules=["q_proj"])
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "said", dtype="float32", format="fp8")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert (tmp_path / "said" / FILE).read_bytes() == (tmp_path / "merged" / FILE).read_bytes()
    merged = load(tmp_path / "merged").state_dict()
    for name, wanted in expected(means).items():
        rows = merged[f"model.layers.2.mlp.experts.{name}"]
        rows = rows.transpose(1, 2) if name == "down_proj" else rows
        assert torch.equal(rows.reshape(wanted.shape), wanted)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "fp8 block",
            r"down_proj.weight and the other experts' are quantised: a block of scales reaches over 40 neurons",
        ),
        (
            "modelopt nvfp4",
            r"holds 'model.layers.1.mlp.experts.\w+' quantised, .*read in bf16, fp16, fp32 or fp8",
        ),
    ],
)
def test_forms_that_are_not_read(kind: str, told: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    with pytest.raises(ValueError, match=told):
        bank(tmp_path, kind)


def test_some_of_them_quantised(tmp_path: Path) -> None:
    write(tmp_path, "fine-grained", left=("layers.2.mlp.experts.3.up",))
    with pytest.raises(ValueError, match=r"experts.3.up_proj.weight of .* is not quantised, and .*: .*if all are"):
        bank(tmp_path, "fine-grained")


def test_scales_that_are_missing(tmp_path: Path) -> None:
    write(tmp_path, "fine-grained")
    tensors = load_file(tmp_path / FILE)
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts.3.up_proj.weight', but no .*its scales are missing"):
        bank(tmp_path, "fine-grained")


def test_another_format_than_the_runs(tmp_path: Path) -> None:
    write(tmp_path, "fine-grained")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    with pytest.raises(ValueError, match=r'is fp8: set quantization.format "fp8"'):
        load_base(section, QuantizationSection(format="nf4"), Placement(CPU))


def test_experts_that_are_not_sparse_here(tmp_path: Path) -> None:
    """Not read in silence as values without their scales."""
    tiny_model("nemotron_h").save_pretrained(tmp_path)
    encode_files(tmp_path, "modelopt fp8")
    with pytest.raises(ValueError, match=r"experts.*_proj.weight of .* is quantised: experts that are not sparse here"):
        load_base(
            ModelSection(name_or_path=str(tmp_path), dtype="float32"), QuantizationSection(format="fp8"), Placement(CPU)
        )


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = next(name for name in tensors if name.endswith("experts.down_proj"))
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, tmp_path / FILE, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": KINDS["autofp8"].settings}))
    with pytest.raises(ValueError, match=rf"{key} of .* is quantised: routed experts are read in fp8 where each has"):
        load_base(
            ModelSection(name_or_path=str(tmp_path), dtype="float32"), QuantizationSection(format="fp8"), Placement(CPU)
        )


@pytest.mark.parametrize(
    ("kind", "told"),
    [("mxfp4", "routed experts are read in fp8, not in mxfp4"), ("fp8 block", "reaches over 40 neurons")],
)
def test_a_plan_refuses_what_a_run_does(kind: str, told: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    config = run("zero3", "fp8")
    config = replace(config, quantization=QuantizationSection(format=KINDS[kind].format))  # type: ignore[arg-type]
    found = planned(tmp_path, config.model, config.quantization)
    assert found
    shape = from_hf_config(json.loads((tmp_path / "config.json").read_text()), "tiny")
    with pytest.raises(ValueError, match=rf"layers.1.mlp.experts is quantised: .*{told}"):
        resident_bytes(shape, config, 2, stored=found[1])


def test_a_plan_knows_experts_that_are_left(tmp_path: Path) -> None:
    """By the name of the module of all of them."""
    write(tmp_path, "fine-grained", left=("experts",))
    edit(tmp_path, lambda settings: settings | {"modules_to_not_convert": ["mlp.experts"]})
    config = run("zero3", "fp8")
    found = planned(tmp_path, config.model, config.quantization)
    assert found
    shape = from_hf_config(json.loads((tmp_path / "config.json").read_text()), "tiny")
    bytes_of = [resident_bytes(shape, config, 1, stored=stored)["weights"] for stored in (found[1], None)]
    assert bytes_of[0] - bytes_of[1] == 2 * 3 * EXPERTS * WIDTH * HIDDEN * (4 - 1)
