"""What an error in one input costs, and how the others make up for it: the factor of the inverse second moments."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01


def upper_of_inverse(hessian: Tensor) -> Tensor:
    """U with ``UᵀU`` the inverse of ``H + 0.01·mean(diag)·I``, upper triangular, (in, in) fp32.

    An input that no token has gets a diagonal of 1: it is tied to no other.

    Args:
        hessian: H, (in, in) fp32, ``2·XᵀX/n`` over n calibration tokens; kept as it is.

    Raises:
        ValueError: the damped H has no Cholesky factor.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the calibration data's second moments have no Cholesky factor ({error}): give more or other sequences"
        ) from error
