"""Stored bits a weight: by the formats' formulas, in the plan, and in a loaded model, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselora_dist.cli import main
from sparselora_dist.codecs import LevelsCodec, codec_of
from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_dist.config import QuantizationSection, RunConfig
from sparselora_dist.config.quantization import READ_ONLY
from sparselora_dist.config.run import ModelSection
from sparselora_dist.io.load import load_base
from sparselora_dist.io.prequantized import planned
from sparselora_dist.plan.hardware import GPUS, Cluster
from sparselora_dist.plan.layouts import make_plan
from sparselora_dist.plan.modules import matrix_sizes
from sparselora_dist.plan.shapes import find_shape
from sparselora_dist.plan.storage import configured_scheme, tree_of
from sparselora_dist.plan.work import Batch
from sparselora_dist.sharding.placement import Placement
from support.merging import edit_json, save_base
from support.plan_runs import run_data
from support.small_floats import KINDS, write_checkpoint

L70 = find_shape("llama-3-70b")
# (format, bits): bits a weight, and GB of the layers of Llama 3 70B to one digit. BiLLM has a mask of columns besides,
# a bit a column; fp8 and nf4 have scales a row.
FORMATS: dict[tuple[str, int | None], tuple[float, float | None]] = {
    ("bcq", 2): (2.25, 19.3),
    ("bcq", 3): (3.375, 28.9),
    ("bcq", 4): (4.5, 38.5),
    ("shiftadd", 3): (3.375, 28.9),
    ("hqq", 2): (2.25, 19.3),
    ("hqq", 3): (3.25, 27.8),
    ("hqq", 4): (4.25, 36.4),
    ("billm", None): (2.875, 24.6),
    ("fp8", None): (8.0, 68.5),
    ("nf4", None): (4.133, 35.4),
    ("nvfp4", None): (4.5, 38.5),
    ("mxfp4", None): (4.25, 36.4),
}
BATCH = Batch(tokens=256, context=0.75, length=256)


def run_of(name: str, bits: int | None, folder: str = "tiny") -> RunConfig:
    data = run_data("single", dtype="float32", name=folder)
    return RunConfig.from_dict(data | {"quantization": {"format": name, "bits": bits}})


@pytest.mark.parametrize(("name", "bits"), FORMATS, ids=lambda value: str(value))
def test_bits_of_70b(name: str, bits: int | None) -> None:
    config = run_of(name, bits)
    codec = codec_of(config.model, config.quantization)
    stored, values = matrix_sizes(tree_of(L70, config, configured_scheme(config, L70, 1)), codec)
    wanted, gigabytes = FORMATS[name, bits]
    assert values == 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert 8 * stored / values == pytest.approx(wanted, abs=0.006 if name in ("fp8", "nf4") else 2e-4)
    assert stored / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole groups of 128 and of parts of one."""
    shape = {"hidden_size": 128, "intermediate_size": 200, "num_attention_heads": 8, "head_dim": 16}
    return save_base(tmp_path_factory.mktemp("base"), **shape)


@pytest.mark.parametrize(("name", "bits"), [key for key in FORMATS if key[0] not in READ_ONLY], ids=lambda v: str(v))
def test_a_loaded_model_keeps_what_is_planned(name: str, bits: int | None, base: Path) -> None:
    config = run_of(name, bits, str(base))
    codec = codec_of(config.model, config.quantization)
    loaded = load_base(config.model, config.quantization, Placement(torch.device("cpu")))
    linears = [module for module in loaded.model.modules() if isinstance(module, FrozenLinear)]
    shape = find_shape(str(base))
    tree = tree_of(shape, config, configured_scheme(config, shape, 1))
    assert sum(part.nbytes for linear in linears for part in linear.parts) == matrix_sizes(tree, codec)[0]
    planned = sum(p.numel * p.dtype.itemsize for p in tree.parameters() if p.kind in ("weights", "scales"))
    assert loaded.report.kept_bytes == planned
    # Rows of whole groups take the format's bits to the byte.
    q: Any = next(linear for linear in linears if linear.in_features == 128 == linear.out_features)
    if name not in ("fp8", "nf4"):
        assert 8 * sum(part.nbytes for part in q.parts) == FORMATS[name, bits][0] * 128 * 128


def test_the_runs_own_format_is_a_row_of_its_own() -> None:
    config = run_of("bcq", 3)
    plan = make_plan(L70, config, Cluster(gpu=GPUS["h100-80gb"], gpus=1, per_node=1), BATCH)
    found = {layout.name: layout for layout in plan.layouts}
    assert list(found) == ["replicated fp32", "replicated nf4", "replicated bcq3"]
    assert plan.configured is found["replicated bcq3"]
    bcq3, nf4 = found["replicated bcq3"], found["replicated nf4"]
    assert nf4.total - bcq3.total == nf4.matrix_bytes - bcq3.matrix_bytes > 6e9
    assert bcq3.bytes["gather"] == nf4.bytes["gather"] - (nf4.traffic.live - bcq3.traffic.live)
    assert bcq3.stored_bits == pytest.approx(3.375) and bcq3.to_dict()["stored_bits"] == bcq3.stored_bits


def test_the_command_says_the_bits_and_the_way(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.json"
    data = run_data("zero3", reentrant=False) | {"quantization": {"format": "bcq", "bits": 3}}
    path.write_text(json.dumps(data))
    words = ["plan", "--config", str(path), "--model", "llama-3-70b", "--gpus", "2", "--tokens", "1024"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "bf16 16 bits a weight, 136.9 GB; nf4 4.133 bits a weight, 35.4 GB; bcq3 3.375 bits a weight, 28.9 GB"
        in printed
    )
    assert "replicated bcq3" in printed and "zero3 bcq3*" in printed
    path.write_text(json.dumps(data | {"quantization": {"format": "fp8"}}))
    assert main([*words, "--gpu", "rtx4090-24gb"]) == 1
    assert "the run's layout 'zero3 fp8' needs" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fp8 channel", "fp8 block", "mxfp8", "nvfp4", "modelopt fp8", "fine-grained powers"])
def test_a_checkpoint_in_small_floats_is_counted_as_it_is(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    """To the byte, with what it leaves plain; there is no other storage of it, and no run that asks for one."""
    left, own = "model.layers.1.self_attn.k_proj", KINDS[kind].settings
    write_checkpoint(tmp_path, kind, left=(left,))
    ignore = "modules_to_not_convert" if own["quant_method"] == "fp8" else "ignore"
    edit_json(tmp_path / "config.json", quantization_config=own | {ignore: ["lm_head", left]})
    path, config = tmp_path / "run.json", run_of(KINDS[kind].format, None, str(tmp_path))
    data = run_data("single", dtype="float32", name=str(tmp_path))
    path.write_text(json.dumps(data | {"quantization": {"format": KINDS[kind].format}}))
    words = ["plan", "--config", str(path), "--gpus", "1", "--json"]
    assert main(words) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    loaded = load_base(config.model, config.quantization, Placement(torch.device("cpu")))
    linears = [module for module in loaded.model.modules() if isinstance(module, FrozenLinear)]
    assert layout["matrix_bytes"] == sum(part.nbytes for linear in linears for part in linear.parts)
    assert layout["bytes_per_gpu"]["weights"] + layout["bytes_per_gpu"]["scales"] == loaded.report.kept_bytes
    path.write_text(json.dumps(data))
    assert main(words) == 2
    assert f'set quantization.format "{KINDS[kind].format}"' in capsys.readouterr().err


def test_bits_that_a_run_leaves_out_are_the_files(tmp_path: Path) -> None:
    """Of a folder that ``sparselora-dist quantize`` made, as loading takes them."""
    settings = {"quant_method": "sparselora", "format": "bcq", "bits": 2, "version": 1}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    found = planned(tmp_path, ModelSection(name_or_path=str(tmp_path)), QuantizationSection(format="bcq"))
    assert found is not None and found[0].width == 2
    assert found[1]("model.layers.0.mlp.up_proj", False) == LevelsCodec("bcq", 2)
