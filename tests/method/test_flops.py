"""FLOPs of a step, against an explicit sum and a case computed by hand."""

from __future__ import annotations

import pytest

from sparselora_dist.method.channels import HeadGeometry
from sparselora_dist.method.flops import FlopModel, LayerShare, layer_shares

HEADS = HeadGeometry(heads=6, kv_heads=2, head_dim=8)


def model(*shares: LayerShare, rank: int = 8, **overrides: int) -> FlopModel:
    shape = {"hidden": 40, "width": 104, "vocabulary": 96, "lora_elements": 1234} | overrides
    return FlopModel(heads=HEADS, layers=shares, estimator_rank=rank, **shape)


def test_dense_is_the_sum_over_matrices_and_tokens() -> None:
    tokens, length, layers = 7, 24.0, 3
    total = 0.0
    for _ in range(tokens):
        for _ in range(layers):
            for out, inner in [(48, 40), (16, 40), (16, 40), (40, 48), (104, 40), (104, 40), (40, 104)]:
                total += 2 * out * inner  # forward
                total += 2 * out * inner  # input gradient
            # Scores and weighted values, each half a square, forward and twice that in backward.
            total += 2 * (2 * 48 * length / 2) * 3
        total += 6 * 1234
        total += 4 * 40 * 96
    assert model(*[LayerShare()] * layers).dense(tokens, length) == pytest.approx(total)


def test_nothing_left_out_costs_as_much_as_dense() -> None:
    dense = model(LayerShare(), LayerShare())
    assert dense.executed(10, 30, 24) == dense.dense(40, 24)


def test_by_hand() -> None:
    """One head of width 2, hidden 2, FFN 4 of which half is kept, no LoRA, no vocabulary, one context token."""
    tiny = FlopModel(
        hidden=2,
        width=4,
        vocabulary=0,
        heads=HeadGeometry(heads=1, kv_heads=1, head_dim=2),
        lora_elements=0,
        layers=(LayerShare(ffn=0.5),),
        estimator_rank=1,
    )
    # q, k, v, o: 4 matrices of 4 elements at 4 FLOPs = 64; FFN kept: 12 of 24 elements at 4 = 48; attention at
    # length 0 costs nothing. Estimator, forward only: A of gate and up 2 * 2 * 2 = 8, B of both 2 * 2 * 4 = 16.
    assert tiny.executed(0, 1, 0) == 64 + 48 + 8 + 16
    assert tiny.dense(1, 0) == 64 + 96
    assert tiny.executed(2, 1, 0) == 2 * (64 + 96) + 136


@pytest.mark.parametrize("group", ["ffn", "qk", "vo"])
def test_more_sparsity_costs_less(group: str) -> None:
    steps = [model(LayerShare(**{group: share}), rank=1).executed(10, 30, 24) for share in (1.0, 0.75, 0.5, 0.25, 0.01)]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == len(steps)


# Of the last layer, without k and v.
TRIMMED = 2 * 48 * 40 + 3 * 104 * 40


@pytest.mark.parametrize("context", [0, 30])
def test_lm_head_and_last_layer_count_where_they_run(context: int) -> None:
    dense = model(LayerShare(), LayerShare(), lora_elements_trimmed=100)
    unused = 40 - 8
    expected = dense.dense(40, 24) - unused * (4 * 40 * 96 + 4 * TRIMMED + 6 * 100)
    assert dense.executed(40 - context, context, 24, logits=8) == pytest.approx(expected)


def test_the_last_layer_is_dense_where_it_runs_and_sparse_in_k_and_v_only() -> None:
    shares = [LayerShare(ffn=0.5, qk=0.25, vo=0.5), LayerShare(ffn=0.1, qk=0.25, vo=0.5)]
    sparse, k_and_v = model(*shares, rank=1), 16 * 40
    # A context token: the first layer as ever, in the last one k, v and the attention's estimate (q, k, v).
    first = model(shares[0], rank=1, vocabulary=0, lora_elements=0).executed(0, 1, 0)
    attention, lora = 2 * 3 * 4 * 48 * 24 / 2, 6 * 1234
    token = first + 4 * (0.25 + 0.5) * k_and_v + 3 * 2 * 40 + attention + lora
    # A dense token: two whole layers but for what only the logits need.
    layer = TRIMMED + 2 * k_and_v
    whole = 4 * (2 * layer - TRIMMED) + attention + lora
    expected = 30 * token + 10 * whole + 8 * 4 * (TRIMMED + 40 * 96)
    assert sparse.executed(10, 30, 24, logits=8) == pytest.approx(expected)


def test_sparsity_in_the_last_layers_ffn_saves_exactly_nothing() -> None:
    runs = [
        model(LayerShare(ffn=0.3), LayerShare(ffn=share, qk=0.5)).executed(1e6, 3e6, 717.3, 8e5)
        for share in (1.0, 0.5, 0.01)
    ]
    assert len(set(runs)) == 1


def test_kept_shares_by_layer_and_group() -> None:
    counts = HEADS.channel_counts(104)
    assert counts == {"ffn": 104, "qk": 8, "vo": 16}
    shares = layer_shares(3, counts, {"ffn": {0: 0.75, 2: 0.99}, "vo": {2: 0.5}})
    assert shares == (LayerShare(ffn=26 / 104), LayerShare(), LayerShare(ffn=2 / 104, vo=0.5))


def test_dense_tokens_are_not_made_cheaper() -> None:
    sparse = model(LayerShare(ffn=0.01, qk=0.25, vo=0.25))
    assert sparse.executed(40, 0, 24) == sparse.dense(40, 24)
