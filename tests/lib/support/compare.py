"""One comparison for all tests."""

from __future__ import annotations

import torch
from torch import Tensor

# (rtol, atol) by dtype of the computation: fp32 sums of a few thousand terms in two orders; bf16 has 8 bits.
TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 2e-6), torch.bfloat16: (3e-2, 3e-2)}


def loss_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, V) logits of the positions whose next token carries a label, from whole or from packed logits."""
    if logits.shape[:2] != labels.shape:
        return logits[0]
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return logits[following != -100]


def sqnr(matrix: Tensor, stored: Tensor) -> float:
    """Signal over quantisation noise in dB."""
    return float(10 * torch.log10(matrix.square().mean() / (stored - matrix).square().mean()))


def assert_close(
    name: str, reference: Tensor, got: Tensor, rtol: float | None = None, atol: float | None = None
) -> None:
    """Fail with the worst element's place and values unless ``got`` equals ``reference`` within the tolerance."""
    assert got.shape == reference.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    default = TOLERANCE.get(got.dtype, (0.0, 0.0))
    rtol, atol = default[0] if rtol is None else rtol, default[1] if atol is None else atol
    got64, reference64 = got.detach().double().cpu(), reference.detach().double().cpu()
    excess = (got64 - reference64).abs() - (atol + rtol * reference64.abs())
    if excess.numel() and not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(float("inf")).argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), excess.shape))
        raise AssertionError(
            f"{name}: at {place} got {got64.flatten()[worst].item():.9g}, expected "
            f"{reference64.flatten()[worst].item():.9g} (rtol {rtol:g}, atol {atol:g}); "
            f"{int((excess > 0).sum())} of {excess.numel()} elements differ"
        )
