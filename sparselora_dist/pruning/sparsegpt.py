"""SparseGPT: what a weight that goes would have added is made up for by those to its right.

With H = 2·XᵀX/n + 0.01·mean(diag)·I and U the upper Cholesky factor of H⁻¹, columns are taken from the left. In each block
of 128 the weights with the smallest ``w²/U_jj²`` go, and ``(w − 0)/U_jj`` times row j of U is taken off the columns that
follow (Frantar and Alistarh 2023, algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layerwise.second_moments import upper_of_inverse
from .pattern import Pattern, smallest

BLOCK = 128


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """The pruned weight, what is left moved so that outputs change least.

    Args:
        weight: (out, in) fp32.
        hessian: (in, in) fp32, ``2·XᵀX/n`` over n calibration tokens; without damping.
        pattern: zeros of every block of 128 columns, over all rows; of every group of M in a row.

    Raises:
        ValueError: the damped Hessian has no Cholesky factor.
    """
    weight = weight.clone()
    weight[:, hessian.diagonal() == 0] = 0.0  # No token has anything there.
    inverse = upper_of_inverse(hessian)
    columns = weight.shape[1]
    # A block holds whole groups.
    width = max(BLOCK // pattern.of, 1) * pattern.of if pattern.of else BLOCK
    for start in range(0, columns, width):
        end = min(start + width, columns)
        block, upper = weight[:, start:end], inverse[start:end, start:end]
        steps = upper.diagonal()
        errors = torch.zeros_like(block)
        gone = torch.zeros_like(block, dtype=torch.bool)
        if not pattern.of:
            gone = smallest(block.square() / steps.square(), pattern, "matrix")
        for j in range(end - start):
            if pattern.of and j % pattern.of == 0:
                group = slice(j, j + pattern.of)
                gone[:, group] = smallest(block[:, group].square() / steps[group].square(), pattern, "row")
            column = block[:, j]
            kept = column.masked_fill(gone[:, j], 0.0)
            errors[:, j] = (column - kept) / steps[j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * upper[j, j + 1 :]
            block[:, j] = kept
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight
