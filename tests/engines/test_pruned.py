"""A pruned base under every engine: the same run as in one process, and not a zero lost, from training to merged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.io.shard_files import TensorFiles
from support.masked import lost
from support.models import ALL_LINEAR, batch
from support.pruned_workers import CASES, PATTERNS

from .test_agreement import assert_same_run

# 16-bit gradients are reduced in other precisions: of that case only the zeros are compared.
EXACT = [case for case in CASES if "bfloat16" not in case]


def matrices(folder: Any) -> dict[str, Tensor]:
    """Of the decoder layers, decoded, by name."""
    files = TensorFiles.of_model(Path(folder))
    if any(name.endswith(".absmax") for name in files.tensors):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        linears = {n: m for n, m in model.named_modules() if ".layers." in n and isinstance(m, Linear4bit)}
        return {f"{n}.weight": dequantize_4bit(m.weight.data, m.weight.quant_state) for n, m in linears.items()}
    return {n: files.get(n) for n, info in files.tensors.items() if len(info.shape) == 2 and ".layers." in n}


@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_are_one_process(single: Any, sharded: Any, case: str) -> None:
    for rank in sharded:
        assert_same_run(single[0]["pruned"][case]["run"], rank["pruned"][case]["run"])


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_is_masked_and_stays_as_it_was(engine: Any, case: str) -> None:
    for rank in engine:
        found = rank["pruned"][case]
        assert len(found["masked"]) == 3 * len(ALL_LINEAR)
        assert found["same"], "a frozen matrix has changed"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "NF4"])
def test_trained_and_merged_not_a_zero_is_lost(engine: Any, case: str, four_bit: bool, tmp_path: Path) -> None:
    found, pattern = engine[0]["pruned"][case], PATTERNS[CASES[case][0]]
    in_4bit = CASES[case][1] == "nf4"
    merge_adapter(found["base"], found["adapter"], tmp_path / "m", load_in_4bit=in_4bit, save_in_4bit=four_bit)
    before, after = matrices(found["base"]), matrices(tmp_path / "m")
    assert len(before) == len(after) == 3 * len(ALL_LINEAR)
    assert lost(before, after) == 0
    for name, weight in after.items():
        assert 0.45 < (weight == 0).double().mean() < 0.7, name
        if pattern.of:
            kept = (weight.reshape(-1, pattern.of) != 0).sum(1)
            assert kept.max() <= pattern.of * (1 - pattern.sparsity), name
    changed = [name for name, weight in before.items() if not torch.equal(weight.bfloat16(), after[name].bfloat16())]
    assert len(changed) == len(before), "every adapter was merged"


@pytest.mark.parametrize("case", ["50 %, float32", "2:4, nf4"])
def test_the_merged_model_gives_the_trained_models_logits(engine: Any, case: str, tmp_path: Path) -> None:
    found = engine[0]["pruned"][case]
    in_4bit = CASES[case][1] == "nf4"
    merge_adapter(found["base"], found["adapter"], tmp_path / "m", dtype="float32", load_in_4bit=in_4bit)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        got = model(input_ids=batch(2, 12, seed=5)["input_ids"]).logits
    torch.testing.assert_close(got, found["logits"], rtol=1e-4, atol=1e-4)
