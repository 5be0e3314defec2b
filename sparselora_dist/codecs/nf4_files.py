"""A matrix in 4 bits as bitsandbytes stores it in files: its values one after another, in blocks of 64 that rows may share.

Codes, scales and the state beside them are what ``bitsandbytes.functional.quantize_4bit`` gives for the matrix (out, in),
but for blocks of zeros alone: they become the level 0.0 here, on every machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, nf4_layout, nonzero
from sparselora_kernels.nf4 import BLOCK, NESTED_BLOCK, absmax_map, levels

from .nf4 import quantize_absmax, quantize_rows

STATE = ".quant_state.bitsandbytes__nf4"
"""Ends the name of the tensor that describes a matrix, after the matrix' own."""
_ZEROS = 0x77  # Two values of the level 0.0.
_MAP_BYTES = 16 * 4
_STATE_BYTES = 256  # About: JSON.


def file_tensors(name: str, matrix: Tensor, double_quant: bool) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds of a 4-bit matrix.

    Args:
        name: of the weight; the others' names begin with it.
        matrix: (out, in), in the dtype that it is to be decoded to.
        double_quant: whether the scales are quantised too.

    Raises:
        ValueError: a value is not finite.
    """
    from bitsandbytes.functional import QuantState

    flat = matrix.reshape(-1)
    count = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -count % BLOCK)).view(-1, BLOCK)
    codes, absmax = quantize_rows(padded, BLOCK)
    code = levels(torch.device("cpu")).clone()
    offset, state2 = None, None
    scales = absmax.view(-1)
    if double_quant:
        scale_codes, nested, offset = quantize_absmax(absmax, 0, absmax)
        scales = scale_codes.view(-1)
        state2 = QuantState(
            absmax=nested, code=absmax_map(nested.device).clone(), blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    state = QuantState(
        absmax=scales, shape=matrix.shape, code=code, blocksize=BLOCK, quant_type="nf4", dtype=matrix.dtype,
        offset=offset, state2=state2,
    )  # fmt: skip
    packed = codes.view(-1)[: -(-count // 2)].clone().view(-1, 1)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def file_bytes(shape: tuple[int, ...], double_quant: bool) -> int:
    """Bytes of :func:`file_tensors`, the state's JSON estimated."""
    count = math.prod(shape)
    blocks = -(-count // BLOCK)
    scales = blocks + 4 * (256 + -(-blocks // NESTED_BLOCK)) if double_quant else 4 * blocks
    return -(-count // 2) + scales + _MAP_BYTES + _STATE_BYTES


def nonzero_of_codes(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where a matrix is not zero, by the codes that a file holds of it: bool of ``shape``."""
    codes = torch.nn.functional.pad(packed.reshape(-1), (0, -packed.numel() % (BLOCK // 2)), value=_ZEROS)
    # What is not zero is said by the codes alone: the scales are not looked at.
    weight = EncodedWeight((codes.view(-1, BLOCK // 2), codes), nf4_layout(BLOCK, False))
    return nonzero(weight).view(-1)[: math.prod(shape)].view(shape)
