"""The command: its table, its JSON, its refusals and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.cli import main
from support.harness import ROOT
from support.models import tiny_config
from support.plan_runs import SPARSE, run_data

CONFIGS = ROOT / "configs"
KINDS = {"weights", "scales", "factors", "lora", "optimizer", "activations", "gather", "logits", "total"}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A run of a tiny model in a folder without weights."""
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_data("fsdp2", sparse=SPARSE, name=str(tmp_path))))
    return path


def plan(*words: Any) -> int:
    return main(["plan", *map(str, words)])


def unquantized(name: str, folder: Path) -> Path:
    """A ready-made run without its quantization section."""
    data = json.loads((CONFIGS / f"{name}.json").read_text())
    del data["quantization"]
    path = folder / "run.json"
    path.write_text(json.dumps(data))
    return path


def test_70b_on_64_gpus(tmp_path: Path, capsys: Any) -> None:
    """bf16 ZeRO-3 across nodes is bound by communication, and the layout that is not is named."""
    config = unquantized("llama3_70b_math_zero3", tmp_path)
    words = ("--model", "meta-llama/Meta-Llama-3-70B", "--config", config, "--gpus", 64, "--gpu", "h100-80gb")
    assert plan(*words, "--gpus-per-node", 8, "--inter-gbps", 50, "--tokens", 4096) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("zero3 bf16*"))
    assert row.endswith("comm")
    text = " ".join(printed.split())
    assert "Take 'zero3-hpz bf16': it fits" in text and "is compute-bound" in text
    assert "Communication-bound: zero3 bf16 (" in text
    assert max(map(len, printed.splitlines())) <= 120


def test_json(tiny: Path, capsys: Any) -> None:
    assert plan("--config", tiny, "--gpus", 16, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    names = [layout["name"] for layout in data["layouts"]]
    shardings = ("zero3", "fsdp2", "zero3-hpz", "hsdp", "replicated")
    assert names == [f"{sharding} {storage}" for sharding in shardings for storage in ("bf16", "nf4")]
    for layout in data["layouts"]:
        sizes = layout["bytes_per_gpu"]
        assert set(sizes) == KINDS and sizes["total"] == sum(sizes.values()) - sizes["total"]
        assert layout["fits"] is True and layout["bound"] in ("compute", "communication")
        assert layout["gathered_bytes_per_step"] >= 0 and layout["compute_s"] > 0 and layout["communication_s"] > 0
    assert data["choice"] in names and data["configured"] == "fsdp2 bf16"


def test_a_run_that_does_not_fit_exits_with_1(tmp_path: Path, capsys: Any) -> None:
    config = unquantized("llama3_70b_math_fsdp2", tmp_path)
    assert plan("--config", config, "--gpus", 8, "--gpu", "rtx4090-24gb", "--json") == 1
    out, err = capsys.readouterr()
    assert "the run's layout 'fsdp2 bf16' needs" in err and "nearest layout that does is 'fsdp2 nf4'" in err
    data = json.loads(out)
    assert data["choice"] == "fsdp2 nf4" and data["refusal"] in err


def test_choice_is_null_where_nothing_fits(capsys: Any) -> None:
    config = CONFIGS / "llama3_70b_math_fsdp2.json"
    assert plan("--config", config, "--gpus", 1, "--gpu", "rtx4090-24gb", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["choice"] is None and "no layout fits" in err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("llama3_*.json")), ids=lambda path: path.stem)
def test_ready_made_configs_can_be_planned(path: Path, capsys: Any) -> None:
    assert plan("--config", path, "--gpus", 8, "--gpu", "h200-141gb") == 0
    assert "Take '" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (("--model", "no/such-model"), "'no/such-model' is neither a file nor known by name"),
        (("--gpu", "h100"), "'--gpu' is 'h100': allowed:"),
        (("--tokens", 0), "'--tokens' is 0"),
        (("--context", 1.5), "'--context' is 1.5: allowed: a share in [0, 1]"),
        (("--gpus-per-node", 3), "'--gpus' is 8: allowed: a multiple of --gpus-per-node (3)"),
        (("--intra-gbps", -1), "'--intra-gbps' is -1"),
        (("--model", "llama-3-8b", "--config", "no.json"), "config file 'no.json' cannot be read"),
    ],
)
def test_bad_input_exits_with_2(tiny: Path, words: tuple[Any, ...], message: str, capsys: Any) -> None:
    assert plan("--config", tiny, "--gpus", 8, *words) == 2
    assert message in capsys.readouterr().err


def test_layers_that_the_model_does_not_have(tiny: Path, capsys: Any) -> None:
    data = run_data("fsdp2", sparse={"layers": {"ffn": {"0-40": 0.5}}})
    tiny.write_text(json.dumps(data))
    assert plan("--config", tiny, "--gpus", 8, "--model", "llama-3-8b") == 2
    assert "sparse_lora.layers.ffn" in capsys.readouterr().err


def test_a_number_that_is_none(tiny: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        plan("--config", tiny, "--gpus", "many")
    assert stop.value.code == 2


LIGHT = """
import sys
import sparselora_dist.plan.layouts, sparselora_dist.plan.known, sparselora_dist.cli.plan
heavy = {"transformers", "peft", "deepspeed", "bitsandbytes", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_arithmetic_loads_neither_models_nor_engines() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=120)
