"""What a plan says of a pruned base: the extra product, the transient matrix, and nothing kept that is rank-wide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist import apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.cli import main
from sparselora_dist.config import RunConfig
from sparselora_dist.method.channels import HeadGeometry
from sparselora_dist.method.flops import FlopModel, LayerShare
from sparselora_dist.method.masked_flops import MaskedMatrix, MaskedWork
from sparselora_dist.plan.hardware import GPUS, Cluster
from sparselora_dist.plan.layouts import make_plan
from sparselora_dist.plan.shapes import find_shape, from_hf_config
from sparselora_dist.plan.storage import configured_scheme, tree_of
from sparselora_dist.plan.work import Batch, flop_model
from sparselora_dist.train.metrics import flop_model as loaded_flop_model
from support.models import ALL_LINEAR, tiny_config, tiny_lora
from support.plan_runs import SPARSE, run_data
from support.pruned import keep

T, N, K, R = 7, 48, 40, 4


def one_matrix(gradient: str, share: float = 1.0) -> FlopModel:
    """A model of one masked q: (N, K), rank R; attention's own products are left out by a length of 0."""
    return FlopModel(
        hidden=K,
        width=0,
        vocabulary=0,
        heads=HeadGeometry(heads=6, kv_heads=6, head_dim=8),
        lora_elements=R * (N + K),
        layers=(LayerShare(qk=share),),
        masked=MaskedWork((MaskedMatrix(layer=0, name="q_proj", rows=N, columns=K, rank=R),), gradient),
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_table_of_multiply_adds(micro_batches: int) -> None:
    """Of q; k, v and o, three matrices of the same size, carry no adapter."""
    others = 3 * 4 * T * N * K
    plain = 4 * T * N * K + 6 * T * R * (N + K)
    exact = 6 * T * N * K + 8 * N * K * R * micro_batches
    straight = 4 * T * N * K + 4 * N * K * R * micro_batches + 4 * T * R * (N + K)
    for gradient, expected in (("exact", exact), ("straight_through", straight)):
        model = one_matrix(gradient)
        assert model.dense(T, 0) == plain + others
        assert model.executed(T, 0, 0, products=micro_batches) == pytest.approx(expected + others)


def test_a_context_token_takes_the_kept_channels_of_the_gradient_too() -> None:
    half, whole = one_matrix("exact", 0.5), one_matrix("exact")
    assert half.masks(0, T, None, 0) == pytest.approx(whole.masks(0, T, None, 0) - T * N * K)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_flops_are_those_of_the_loaded_model(gradient: str) -> None:
    data = run_data("fsdp2", sparse=SPARSE, targets=ALL_LINEAR)
    config = RunConfig.from_dict(data | {"sparse_base": {"gradient": gradient}})
    shape = from_hf_config(tiny_config().to_dict(), "tiny")
    model = tiny_lora(targets=ALL_LINEAR)
    for name, parameter in model.named_parameters():
        if "base_layer.weight" in name:
            parameter.data.mul_(keep(parameter.data, "2:4"))
    apply_sparselora(model, config.sparse_lora, sparse_base=config.sparse_base)
    state = find_state(model)
    assert state is not None and len(state.masked) == 21
    tree = tree_of(shape, config, configured_scheme(config, shape, 2))
    planned, loaded = flop_model(shape, config, tree), loaded_flop_model(model, state)
    assert planned.masked is not None and loaded.masked is not None
    assert set(planned.masked.matrices) == set(loaded.masked.matrices)
    for args in ((10, 30, 24, 8, 2), (10, 30, 24, None, 1)):
        assert planned.executed(*args) == pytest.approx(loaded.executed(*args), rel=1e-12)


def planned(**sections: Any) -> dict[str, Any]:
    """Rows of Llama-3-8B on 64 GPUs, rank 16 on all linears."""
    data = run_data("fsdp2", targets=ALL_LINEAR, rank=16) | {"sparse_lora": {"enabled": False}} | sections
    cluster = Cluster(gpu=GPUS["h100-80gb"], gpus=64, per_node=8)
    plan = make_plan(
        find_shape("llama-3-8b"), RunConfig.from_dict(data), cluster, Batch(tokens=4096, context=0.75, length=4096)
    )
    return {layout.name: layout for layout in plan.layouts}


def test_one_matrix_more_in_memory_and_a_product_more_in_time() -> None:
    plain, exact = planned(), planned(sparse_base={})
    straight = planned(sparse_base={"gradient": "straight_through"})
    matrix = 14336 * 4096 * 2
    for name, transient in (("fsdp2 bf16", matrix), ("zero3 bf16", matrix), ("fsdp2 nf4", 0)):
        assert exact[name].bytes["gather"] - plain[name].bytes["gather"] == transient, name
        assert exact[name].traffic == plain[name].traffic
        assert exact[name].bytes["activations"] < plain[name].bytes["activations"]
        for kind in ("weights", "scales", "lora", "optimizer", "logits"):
            assert exact[name].bytes[kind] == plain[name].bytes[kind]
    done = {key: rows["fsdp2 bf16"].work.executed_flops for key, rows in (("p", plain), ("e", exact), ("s", straight))}
    # At 4096 tokens and rank 16: 6/4 of the frozen products less the branch; and nearly nothing.
    assert 1.3 < done["e"] / done["p"] < 1.5 and 0.98 < done["s"] / done["p"] < 1.02
    assert plain["fsdp2 bf16"].work.dense_flops == exact["fsdp2 bf16"].work.dense_flops
    assert exact["fsdp2 bf16"].to_dict()["flops_of_masks"] == exact["fsdp2 bf16"].work.mask_flops > 0


def test_the_command_says_it(tmp_path: Path, capsys: Any) -> None:
    data = run_data("fsdp2", targets=ALL_LINEAR, rank=16, name="llama-3-8b") | {"sparse_lora": {"enabled": False}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data | {"sparse_base": {"enabled": True}}))
    assert main(["plan", "--config", str(path), "--gpus", "8", "--tokens", "4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("sparse_base"))
    assert all(len(line) <= 116 for line in lines[start : start + 3]) and lines[start + 3].startswith("GB a GPU")
    said = " ".join(" ".join(lines).split())
    assert "sparse_base (exact): every adapted matrix counts as pruned; masks add +" in said
    assert "One transient matrix of 0.12 GB is in gather" in said
