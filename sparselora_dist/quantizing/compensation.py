"""Quantising with calibration: what an error adds to the outputs is made up for by the inputs that are still to come.

With H = 2·XᵀX/n, damped by 1 %, and U the upper Cholesky factor of H⁻¹ (``H⁻¹ = UᵀU``), inputs are taken in blocks b of 128.
Of a weight W (out, in) and what it became, Q:

    exact       E = (W_b − Q_b)·U_bb⁻¹          W_later −= E·U_b,later         the least squares answer
    diagonal    E = (W_b − Q_b)/diag(U_bb)      W_later −= E·U_b,later         BiLLM's own form: right for one column
    none        nothing

A matrix that is stored transposed (o, down) has one input a stored row, its groups along the outputs. Exact is then finer:
each stored row is encoded whole, and its error ``(w − q)/U_ii`` goes to all rows below, those of the block at once, the rest
when the block is done.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .groups import GROUP, Encoder

Compensate = Literal["exact", "diagonal", "none"]


@torch.no_grad()
def quantize(encoder: Encoder, matrix: Tensor, upper: Tensor | None, how: Compensate, across: bool) -> Tensor:
    """Encode a matrix; what it decodes to, (channels, length) fp32.

    Args:
        encoder: of the matrix.
        matrix: (channels, length) fp32, as it is stored.
        upper: U, fp32, of as many inputs; without one errors cost the same everywhere.
        how: ``none`` without ``upper``.
        across: inputs are the stored rows, and not the values of one.
    """
    inputs = matrix.shape[0 if across else 1]
    costs = matrix.new_ones(inputs) if upper is None else upper.diagonal().square().reciprocal()
    encoder.begin(matrix, costs, across)
    if across:
        return _across(encoder, matrix.clone(), upper, how)
    return _along(encoder, matrix.clone(), costs, upper, how)


def _along(encoder: Encoder, weight: Tensor, costs: Tensor, upper: Tensor | None, how: Compensate) -> Tensor:
    """Stored rows run along the input."""
    result = torch.empty_like(weight)
    for number, start in enumerate(range(0, weight.shape[1], GROUP)):
        here = slice(start, start + GROUP)
        own = upper[here, here] if upper is not None and how == "exact" else None
        result[:, here] = encoder.block(number, weight[:, here], costs[here], own)
        if upper is not None and how != "none":
            errors = _errors(weight[:, here] - result[:, here], upper[here, here], how)
            weight[:, start + GROUP :] -= errors @ upper[here, start + GROUP :]
    return result


def _across(encoder: Encoder, weight: Tensor, upper: Tensor | None, how: Compensate) -> Tensor:
    """A stored row is one input."""
    result = torch.empty_like(weight)
    for start in range(0, len(weight), GROUP):
        here, later = slice(start, start + GROUP), slice(start + GROUP, None)
        own = upper[here, here] if upper is not None and how == "exact" else None
        result[here] = encoder.rows(start, weight[here], own)
        if upper is not None and how != "none":
            errors = _errors((weight[here] - result[here]).t(), upper[here, here], how)
            weight[later] -= upper[here, later].t() @ errors.t()
    return result


def _errors(difference: Tensor, own: Tensor, how: Compensate) -> Tensor:
    """E (out, width) of W − Q (out, width) and U_bb."""
    if how == "diagonal":
        return difference / own.diagonal()
    return torch.linalg.solve_triangular(own, difference, upper=True, left=False)


def output_error(weight: Tensor, found: Tensor, products: Tensor | None) -> float:
    """How far the outputs are off: ‖X·(W − Q)ᵀ‖² / ‖X·Wᵀ‖² over the calibration tokens, or of the weights alone without.

    Args:
        weight, found: (out, in) fp32.
        products: XᵀX (in, in) fp32.
    """
    both = []
    for one in (weight - found, weight):
        seen = one if products is None else one @ products
        both.append((seen * one).sum(dtype=torch.float64).item())
    return both[0] / both[1] if both[1] > 0 else 0.0
