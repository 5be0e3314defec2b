"""NF4 under the engines: bytes equal to bitsandbytes', 1/N of them on each rank, and the training of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.layouts import matrix_name
from support.compare import assert_close
from support.nf4_workers import MATRICES

TURNED = ("o_proj", "down_proj")


def assert_bitsandbytes_bytes(parts: dict[str, Any], base: Path, dtype: torch.dtype, double: bool) -> None:
    """Codes, absmax codes or absmax, nested scales and offset of every matrix."""
    checkpoint = TensorFiles.of_model(base)
    for layer, name in MATRICES:
        weight = checkpoint.read(f"model.{matrix_name(layer, name)}.weight").to(dtype)
        weight = weight.t().contiguous() if name in TURNED else weight
        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        got_codes, scales = (parts[f"{matrix_name(layer, name)}.{part}"] for part in ("codes", "scales"))
        assert torch.equal(got_codes.flatten(), codes.flatten()), name
        count = weight.shape[1] // 64
        if not double:
            assert torch.equal(scales.clone().view(torch.float32).flatten(), state.absmax)
            continue
        assert torch.equal(scales[:, :count].flatten(), state.absmax), name
        nested = scales[:, count:-4].clone().view(torch.float32)
        first = torch.arange(weight.shape[0]) * count // 256
        assert torch.equal(nested[:, 0], state.state2.absmax[first]), name
        assert (scales[:, -4:].clone().view(torch.float32) == state.offset).all(), name


@pytest.mark.parametrize("moment", ["start", "after"])
def test_shards_gather_to_bitsandbytes_bytes(sharded: Any, base: Path, moment: str) -> None:
    for rank in sharded:
        assert_bitsandbytes_bytes(rank[moment], base, torch.float32, True)


def test_without_double_quantisation(sharded: Any, single: Any, base: Path) -> None:
    for rank in (*sharded, *single):
        assert_bitsandbytes_bytes(rank["single"], base, torch.float32, False)


def test_a_bf16_engine_casts_nothing(sharded: Any, base: Path) -> None:
    """Scales are fp32 inside; after a step in bf16 every bit of them is there."""
    for rank in sharded:
        assert_bitsandbytes_bytes(rank["bf16"], base, torch.bfloat16, True)


def test_random_bytes_survive_sharding_and_gathering(sharded: Any) -> None:
    for rank in sharded:
        ((equal, local, whole),) = rank["random"]
        assert equal
        assert local == pytest.approx(whole / len(sharded), rel=0.02)


def test_each_rank_holds_its_share(sharded: Any) -> None:
    size = len(sharded)
    endings = ("codes", "scales", "_a", "_b")
    names = [name for name in sharded[0]["held"] if name.endswith(endings)]
    assert len([name for name in names if name.endswith("codes")]) == len(MATRICES) and len(names) > 60
    for name in names:
        for rank in sharded:
            p = rank["held"][name]
            whole = torch.Size(p["shape"]).numel()
            # FSDP2 deals whole rows, ZeRO-3 elements; the padding is at most one of them.
            unit = whole // p["shape"][0] if p["dtensor"] else 1
            assert p["sharded"] and not p["trainable"], name
            assert abs(p["local"] - whole / size) <= unit, (name, p)
            assert p["dtype"] == (torch.uint8 if name.endswith(("codes", "scales")) else torch.float32), name
    for rank in sharded:
        assert all(p["sharded"] for p in rank["held"].values())


def test_ranks_train_as_one_process(sharded: Any, single: Any) -> None:
    reference = single[0]["sparse"]
    for rank in sharded:
        got = rank["sparse"]
        assert got["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        for step, masks in enumerate(reference["masks"]):
            assert {layer: set(groups) for layer, groups in masks.items()} == {
                layer: set(groups) for layer, groups in got["masks"][step].items()
            }
            for layer, groups in masks.items():
                for group, kept in groups.items():
                    assert torch.equal(kept, got["masks"][step][layer][group]), (step, layer, group)
        for name, gradient in reference["gradients"].items():
            assert gradient.abs().max() > 1e-6
            assert_close(name, gradient, got["gradients"][name], rtol=1e-4, atol=1e-5 * gradient.abs().max())
        for (loss, norm), (own_loss, own_norm) in zip(single[0]["all linear"], rank["all linear"]):
            assert own_loss == pytest.approx(loss, rel=1e-5) and own_norm == pytest.approx(norm, rel=1e-4)


def test_nf4_sparse_is_dequantise_everything_then_sparse(single: Any) -> None:
    """Equality 6 of the method: the same losses, masks and gradients as a plain model of the dequantised matrices."""
    nf4, plain = single[0]["sparse"], single[0]["dequantised"]
    # The first step is the same arithmetic on the same numbers; later ones follow from it.
    assert nf4["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    for mine, other in zip(nf4["masks"], plain["masks"]):
        for layer, groups in other.items():
            for group, kept in groups.items():
                assert torch.equal(mine[layer][group], kept)
    for name, gradient in plain["gradients"].items():
        assert_close(name, gradient, nf4["gradients"][name], rtol=1e-5, atol=1e-6 * gradient.abs().max())


def test_matrices_can_be_read_back_from_shards(sharded: Any, single: Any) -> None:
    for rank in sharded:
        if matrices := rank.get("from sharded"):
            for name, expected in single[0]["weights"].items():
                assert torch.equal(matrices[name], expected), name
