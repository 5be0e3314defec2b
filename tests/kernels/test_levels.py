"""Codes and bits come back from their bytes, and lie where the layout says."""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels import level_layout
from sparselora_kernels.levels import (
    BILLM,
    GROUP,
    HQQ,
    SIGNS,
    groups,
    numbers,
    pack_bits,
    pack_codes,
    unpack_bits,
    unpack_codes,
)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_come_back(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 2 * GROUP), dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    assert planes.shape == (3, 2 * bits * 16) and torch.equal(unpack_codes(planes, bits), codes)
    # Value 9 of group 1: bit 1 of byte 1 of its planes.
    for plane in range(bits):
        assert (planes[2, (bits + plane) * 16 + 1] >> 1 & 1) == (codes[2, GROUP + 9] >> plane & 1)
    assert pack_codes(codes[:0], bits).shape == (0, 2 * bits * 16)


def test_bits_come_back() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(2, 128)
    bits = unpack_bits(data)
    assert bits.shape == (2, 1024) and bits.dtype == torch.bool
    assert bits[0, 8:16].tolist() == [True] + 7 * [False] and bits[1, -8:].all()
    assert torch.equal(pack_bits(bits), data)


def test_sizes() -> None:
    assert [groups(length) for length in (1, 128, 129)] == [1, 1, 2]
    assert [numbers(HQQ, 3), numbers(SIGNS, 3), numbers(BILLM, 2)] == [2, 3, 7]
    with pytest.raises(ValueError, match=r"rule 2 has codes of 2 bits, not of 3"):
        level_layout(128, BILLM, 3)
