"""Each criterion against its published formula, computed another way: NumPy, fp64, weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselora_dist.pruning.criteria import METHODS
from sparselora_dist.pruning.pattern import Pattern, smallest

PATTERNS = ["0.5", "0.3", "2:4", "4:8", "1:4", "80:160"]


def pattern_of(text: str) -> Pattern:
    return Pattern.parse(text) if ":" in text else Pattern.share(float(text))


def weight_and_inputs(rows: int = 24, columns: int = 160, tokens: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    # Correlated, and of very different sizes.
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    scale = torch.exp(torch.randn(columns, generator=generator))
    return weight, torch.randn(tokens, columns, generator=generator) @ mix * scale


def statistic_of(method: str, inputs: Tensor) -> Tensor | None:
    kind = METHODS[method].statistic
    return {"": None, "squares": inputs.square().sum(0), "products": inputs.t() @ inputs}[kind]


def pruned(method: str, weight: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    return METHODS[method].prune(weight, statistic_of(method, inputs), inputs.shape[0], pattern)


def score(method: str, weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    found = np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            size, norm = abs(weight[i, j]), np.linalg.norm(inputs[:, j])
            if method == "magnitude":
                found[i, j] = size
            elif method == "wanda":
                found[i, j] = size * norm
            else:
                relative = size / np.abs(weight[:, j]).sum() + size / np.abs(weight[i]).sum()
                found[i, j] = relative * norm**0.5
    return found


def gone(scores: np.ndarray, text: str, by_row: bool) -> np.ndarray:
    """Where the smallest are."""
    found = np.zeros(scores.shape, dtype=bool)
    rows, columns = scores.shape
    if ":" in text:
        keep, of = map(int, text.split(":"))
        for i in range(rows):
            for start in range(0, columns, of):
                order = sorted(range(of), key=lambda j, i=i, start=start: scores[i, start + j])
                found[i, [start + j for j in order[: of - keep]]] = True
        return found
    if by_row:
        for i in range(rows):
            found[i, np.argsort(scores[i])[: round(columns * float(text))]] = True
        return found
    flat = np.argsort(scores.ravel())[: round(scores.size * float(text))]
    found.ravel()[flat] = True
    return found


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_masks_are_those_of_the_formula(method: str, text: str) -> None:
    weight, inputs = weight_and_inputs()
    found = pruned(method, weight, inputs, pattern_of(text))
    expected = gone(score(method, weight.double().numpy(), inputs.double().numpy()), text, method == "wanda")
    assert np.array_equal((found == 0).numpy(), expected)
    assert torch.equal(found[found != 0], weight[found != 0]), "what is kept is as it was"


def obs(weight: np.ndarray, hessian: np.ndarray, text: str) -> np.ndarray:
    """Optimal brain surgeon from the left, the inverse of what is left computed anew for every column."""
    weight, columns = weight.copy(), weight.shape[1]
    corner = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    steps = np.sqrt([inverse[0, 0] for inverse in corner])
    mask = np.zeros(weight.shape, dtype=bool)
    for j in range(columns):
        if ":" in text:
            of = int(text.split(":")[1])
            if j % of == 0:
                mask[:, j : j + of] = gone((weight[:, j : j + of] / steps[j : j + of]) ** 2, text, True)
        elif j % 128 == 0:
            block = slice(j, min(j + 128, columns))
            mask[:, block] = gone((weight[:, block] / steps[block]) ** 2, text, False)
        error = np.where(mask[:, j], weight[:, j], 0.0) / corner[j][0, 0]
        weight[:, j + 1 :] -= np.outer(error, corner[j][0, 1:])
        weight[mask[:, j], j] = 0.0
    return weight


@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_is_optimal_brain_surgeon(text: str) -> None:
    weight, inputs = weight_and_inputs()
    found = pruned("sparsegpt", weight, inputs, pattern_of(text)).double().numpy()
    x = inputs.double().numpy()
    hessian = 2 * x.T @ x / x.shape[0]
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    expected = obs(weight.double().numpy(), hessian, text)
    same = (found == 0) == (expected == 0)
    assert same.mean() >= 0.999
    rows = same.all(1)  # Another zero moves what is to its right.
    assert rows.mean() > 0.8
    assert np.abs(found - expected)[rows].max() < 2e-3


def test_sparsegpt_changes_outputs_less_than_zeros_alone() -> None:
    weight, inputs = weight_and_inputs()

    def error(method: str) -> float:
        return float((inputs @ (pruned(method, weight, inputs, Pattern.share(0.5)) - weight).t()).square().mean())

    assert error("sparsegpt") < error("wanda") < error("magnitude")


def test_inputs_that_are_always_zero_are_pruned_first() -> None:
    weight, inputs = weight_and_inputs()
    inputs[:, :40] = 0.0
    for method in ("wanda", "ria", "sparsegpt"):
        found = pruned(method, weight, inputs, Pattern.share(0.25))
        assert torch.isfinite(found).all()
        if method != "sparsegpt":  # Which counts block by block.
            assert (found[:, :40] == 0).all() and (found[:, 40:] != 0).all()
        assert (found[:, :40] == 0).all()


def test_of_equal_scores_the_first_go() -> None:
    zeros = smallest(torch.ones(2, 8), Pattern.parse("2:4"), "row")
    assert zeros.tolist() == [[True, True, False, False] * 2] * 2


@pytest.mark.parametrize("text", ["2", "4:4", "0:4", "5:4", "2:4:8", "a:b", ""])
def test_a_pattern_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="N kept of every M"):
        Pattern.parse(text)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 50.0, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Pattern.share(share)


def test_a_pattern_that_does_not_divide() -> None:
    Pattern.parse("2:4").check(64, "q_proj")
    with pytest.raises(ValueError, match=r"pattern 2:4: the rows of layers\.0\.q_proj have 66 weights"):
        Pattern.parse("2:4").check(66, "layers.0.q_proj")
