"""Which dimensions belong together, asked of the family's own rotary embedding."""

from __future__ import annotations

import sys

import pytest
import torch

from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.channels import HeadGeometry
from support.every_type import tiny_model

HALVES = [(p, p + 8) for p in range(8)]
NEIGHBOURS = [(2 * p, 2 * p + 1) for p in range(8)]


@pytest.mark.parametrize(
    ("model_type", "pairs"),
    [
        ("llama", HALVES),
        ("cohere", NEIGHBOURS),
        ("ernie4_5", NEIGHBOURS),
        ("gpt_oss", HALVES),  # An angle for two dimensions.
        # A part of the head is rotated; the rest is paired among itself.
        ("stablelm", [(0, 2), (1, 3), *((p, p + 6) for p in range(4, 10))]),
        ("glm4", [*NEIGHBOURS[:4], *((p, p + 4) for p in range(8, 12))]),
        ("gptj", NEIGHBOURS),  # Half of them rotated; the others may be paired so, too.
        ("phi3", HALVES),  # q, k and v in one matrix.
        ("gpt_neox", [(0, 2), (1, 3), *((p, p + 6) for p in range(4, 10))]),
        ("opt", HALVES),  # No rotary embedding.
    ],
)
def test_the_pairs_of_a_head(model_type: str, pairs: list[tuple[int, int]]) -> None:
    attention = decoder_layers(tiny_model(model_type))[0].attention
    assert attention is not None and attention.heads.head_dim == 16 and not attention.missing
    assert list(attention.heads.pairs or HALVES) == pairs


@pytest.mark.parametrize("model_type", ["cohere", "glm4", "gpt_oss", "helium", "llama"])
def test_a_kept_pair_is_rotated_within_itself(model_type: str) -> None:
    """Zero some channels and rotate, or rotate and zero them: the same."""
    model = tiny_model(model_type)
    attention = decoder_layers(model)[0].attention
    assert attention is not None
    rotate = sys.modules[type(attention.module).__module__].apply_rotary_pos_emb
    positions = torch.arange(5)[None]
    angles = model.model.rotary_emb(torch.zeros(1, 5, 64), positions)
    kept = torch.zeros(attention.heads.kv_heads * 16)
    kept[attention.heads.k_rows(torch.tensor([0, 3, 9, 14]))] = 1
    mask = kept.view(1, attention.heads.kv_heads, 1, 16)
    k = torch.randn(1, attention.heads.kv_heads, 5, 16)
    torch.testing.assert_close(rotate(k * mask, k * mask, *angles)[1], rotate(k, k, *angles)[1] * mask)
    assert 0 < kept.sum() == 8


def test_sums_of_other_pairs() -> None:
    usual = HeadGeometry(heads=4, kv_heads=2, head_dim=4)
    other = HeadGeometry.of_pairs(4, 2, 4, ((0, 1), (2, 3)))
    assert HeadGeometry.of_pairs(4, 2, 4, ((0, 2), (1, 3))) == usual
    scores = torch.arange(8.0)
    assert usual.k_pair_sums(scores).tolist() == [2, 4, 10, 12]
    assert other.k_pair_sums(scores).tolist() == [1, 5, 9, 13]
    assert other.q_pair_sums(torch.arange(16.0)).tolist() == [1 + 9, 5 + 13, 17 + 25, 21 + 29]
    channel = torch.tensor([1, 2])
    assert usual.k_rows(channel).tolist() == [1, 3, 4, 6]
    assert other.k_rows(channel).tolist() == [2, 3, 4, 5]
    assert other.q_rows(channel).tolist() == [2, 3, 6, 7, 8, 9, 12, 13]
