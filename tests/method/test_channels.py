"""Channels under grouped-query attention, against the definition head by head and channel by channel."""

from __future__ import annotations

import pytest
import torch

from sparselora_dist.method.channels import HeadGeometry

# (query heads, key/value heads, head width): GQA, ratio 1, multi-query, an odd group, a single pair.
GEOMETRIES = [(6, 2, 8), (4, 4, 6), (5, 1, 4), (9, 3, 10), (2, 1, 2), (1, 1, 2)]
geometries = pytest.mark.parametrize("shape", GEOMETRIES, ids=str)


def make(shape: tuple[int, int, int]) -> HeadGeometry:
    return HeadGeometry(heads=shape[0], kv_heads=shape[1], head_dim=shape[2])


@geometries
def test_qk_channel_owns_a_rotary_pair_of_k_and_of_every_query_head_in_the_group(shape: tuple[int, int, int]) -> None:
    heads, kv_heads, dim = shape
    geometry = make(shape)
    assert geometry.qk_channels == kv_heads * dim // 2
    for h in range(kv_heads):
        for p in range(dim // 2):
            channel = torch.tensor([h * (dim // 2) + p])
            k_rows = [h * dim + d for d in range(dim) if d % (dim // 2) == p]
            q_rows = [
                g * dim + d for g in range(heads) for d in range(dim)
                if g // (heads // kv_heads) == h and d % (dim // 2) == p
            ]  # fmt: skip
            assert geometry.k_rows(channel).tolist() == k_rows
            assert geometry.q_rows(channel).tolist() == q_rows


@geometries
def test_vo_channel_owns_a_row_of_v_and_a_column_of_o_per_query_head_of_the_group(shape: tuple[int, int, int]) -> None:
    heads, kv_heads, dim = shape
    geometry = make(shape)
    assert geometry.vo_channels == kv_heads * dim
    for h in range(kv_heads):
        for d in range(dim):
            channel = torch.tensor([h * dim + d])
            assert geometry.v_rows(channel).tolist() == [h * dim + d]
            columns = [g * dim + d for g in range(heads) if g // (heads // kv_heads) == h]
            assert geometry.o_columns(channel).tolist() == columns


@geometries
def test_several_channels_own_the_sorted_union(shape: tuple[int, int, int]) -> None:
    geometry = make(shape)
    for count, owners in (
        (geometry.qk_channels, (geometry.q_rows, geometry.k_rows)),
        (geometry.vo_channels, (geometry.v_rows, geometry.o_columns)),
    ):
        channels = torch.randperm(count)[: (count + 1) // 2].sort().values
        for rows in owners:
            union = sorted(row for c in channels for row in rows(c[None]).tolist())
            assert rows(channels).tolist() == union


@geometries
def test_all_channels_own_everything_once(shape: tuple[int, int, int]) -> None:
    heads, kv_heads, dim = shape
    geometry = make(shape)
    qk, vo = torch.arange(geometry.qk_channels), torch.arange(geometry.vo_channels)
    assert geometry.q_rows(qk).tolist() == geometry.o_columns(vo).tolist() == list(range(heads * dim))
    assert geometry.k_rows(qk).tolist() == geometry.v_rows(vo).tolist() == list(range(kv_heads * dim))


@geometries
def test_pair_sums(shape: tuple[int, int, int]) -> None:
    heads, kv_heads, dim = shape
    q, k = torch.randn(heads * dim), torch.randn(kv_heads * dim)
    q_sums, k_sums = torch.zeros(kv_heads * dim // 2), torch.zeros(kv_heads * dim // 2)
    for d in range(dim):
        for h in range(kv_heads):
            k_sums[h * (dim // 2) + d % (dim // 2)] += k[h * dim + d]
        for g in range(heads):
            q_sums[g // (heads // kv_heads) * (dim // 2) + d % (dim // 2)] += q[g * dim + d]
    torch.testing.assert_close(make(shape).q_pair_sums(q), q_sums)
    torch.testing.assert_close(make(shape).k_pair_sums(k), k_sums)


def test_impossible_geometries_are_refused() -> None:
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4"):
        make((6, 4, 8))
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        make((6, 2, 7))
