"""Recomputation reuses the masks of its own forward: same gradients, and nothing is chosen twice (equality 5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection, set_step
from sparselora_dist.apply import find_state
from sparselora_dist.layers import context
from sparselora_dist.layers.estimator import AttentionEstimator, FFNEstimator
from support.models import ALL_LINEAR, batch, gradients, tiny_lora
from support.oracle import Step, assert_same, train_step

LAYERS = {"ffn": {"0-2": 0.8}, "qk": {"1-2": 0.5}, "vo": {"1": 0.5}}
SITES = 2 + 2  # FFN of three layers but for the last, which needs no mask; attention of two.
kinds = pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
recomputing = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def sparse_model(reentrant: bool | None = None, **options: Any) -> PeftModel:
    model = tiny_lora("qwen3", ALL_LINEAR)
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": LAYERS, **options}))
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def count_estimates(model: PeftModel) -> list[torch.nn.Module]:
    """A list that grows by one with every run of an estimator."""
    calls: list[torch.nn.Module] = []
    for module in model.modules():
        if isinstance(module, (FFNEstimator, AttentionEstimator)):
            module.register_forward_hook(lambda m, a, y: calls.append(m))
    return calls


def masks_of(model: PeftModel) -> dict[tuple[int, str], list[int]]:
    chosen = selection(model)
    return {(layer, group): mask.tolist() for layer, groups in chosen.items() for group, mask in groups.items()}


@kinds
def test_same_masks_and_gradients_and_one_choice_per_layer(reentrant: bool | None) -> None:
    plain = sparse_model()
    expected = train_step(plain, batch())
    model = sparse_model(reentrant)
    calls = count_estimates(model)
    layer_runs: list[int] = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda m, a: layer_runs.append(1))
    got = train_step(model, batch())
    assert_same(expected, got, batch())
    assert masks_of(model) == masks_of(plain)
    assert len(calls) == SITES
    assert len(layer_runs) == (1 if reentrant is None else 2), "checkpointing did not recompute"


@kinds
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_forwards_pending(reentrant: bool | None, order: tuple[int, int]) -> None:
    """Each backward finds the masks of its own forward, whatever came in between."""
    batches = [batch(seed=1), batch(rows=3, length=17, seed=2)]
    expected = [train_step(sparse_model(), data) for data in batches]
    model = sparse_model(reentrant)
    outputs = [model(**data) for data in batches]
    for number in order:
        model.zero_grad()
        outputs[number].loss.backward()
        out = outputs[number]
        got = Step(out.loss.detach(), out.logits.detach(), gradients(model))
        assert_same(expected[number], got, batches[number])


@kinds
def test_gradient_accumulation_adds_up(reentrant: bool | None) -> None:
    batches = [batch(seed=seed) for seed in range(3)]
    expected: dict[str, Tensor] = {}
    for data in batches:
        for name, grad in train_step(sparse_model(), data).gradients.items():
            expected[name] = expected.get(name, 0) + grad
    for joint in (False, True):
        model = sparse_model(reentrant)
        calls = count_estimates(model)
        if joint:
            sum(model(**data).loss for data in batches).backward()
        else:
            for data in batches:
                model(**data).loss.backward()
        got = gradients(model)
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)
        assert len(calls) == SITES * len(batches)


@recomputing
def test_an_evaluation_between_forward_and_backward_changes_nothing(reentrant: bool) -> None:
    expected = train_step(sparse_model(), batch())
    model = sparse_model(reentrant)
    out = model(**batch())
    model.eval()
    with torch.no_grad():
        model(**batch(seed=5))
    model.train()
    out.loss.backward()
    got = Step(out.loss.detach(), out.logits.detach(), gradients(model))
    assert_same(expected, got, batch())


@recomputing
def test_forwards_without_gradients_do_not_push_out_a_pending_one(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation in training mode, between a forward and its backward, is one forward per token."""
    monkeypatch.setattr(context, "_PENDING_FORWARDS", 2)
    expected = train_step(sparse_model(), batch())
    model = sparse_model(reentrant)
    out = model(**batch())
    with torch.no_grad():
        for seed in range(3):
            model(**batch(seed=seed))
    out.loss.backward()
    assert_same(expected, Step(out.loss.detach(), out.logits.detach(), gradients(model)), batch())


@recomputing
def test_a_dense_forward_is_recomputed_densely(reentrant: bool) -> None:
    """Also when the schedule has switched between its forward and its backward."""
    model = sparse_model(start_step=2)
    set_step(model, 0, 10)
    expected = train_step(model, batch())
    model = sparse_model(reentrant, start_step=2)
    set_step(model, 0, 10)
    out = model(**batch())
    set_step(model, 2, 10)
    sparse_out = model(**batch())
    assert sparse_out.loss != out.loss
    out.loss.backward()
    assert_same(expected, Step(out.loss.detach(), out.logits.detach(), gradients(model)), batch())


@recomputing
def test_too_many_pending_forwards_is_a_clear_error(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_PENDING_FORWARDS", 2)
    model = sparse_model(reentrant)
    losses = [model(**batch(seed=seed)).loss for seed in range(3)]
    losses[1].backward()
    losses[2].backward()
    with pytest.raises(RuntimeError, match=r"layer 2 is recomputed .* more than 2 forwards were waiting"):
        losses[0].backward()


# --- interval --------------------------------------------------------------------------------------------------------


def steps_chosen(model: PeftModel, steps: range) -> list[int]:
    """Steps at which masks were chosen, each step with a batch of its own; checks that the others reuse them."""
    calls, chosen, before = count_estimates(model), [], masks_of(model)
    for step in steps:
        set_step(model, step, 100)
        calls.clear()
        train_step(model, batch(seed=step))
        assert len(calls) in (0, SITES)
        if calls:
            chosen.append(step)
        else:
            assert masks_of(model) == before
        before = masks_of(model)
    return chosen


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
def test_interval_keeps_masks_for_n_steps(reentrant: bool | None) -> None:
    assert steps_chosen(sparse_model(reentrant, interval=3), range(7)) == [0, 3, 6]


def test_interval_one_chooses_at_every_forward() -> None:
    assert steps_chosen(sparse_model(), range(3)) == [0, 1, 2]


def test_micro_batches_of_a_step_share_a_kept_mask() -> None:
    model = sparse_model(interval=2)
    calls = count_estimates(model)
    set_step(model, 0, 10)
    for seed in range(3):
        train_step(model, batch(seed=seed))
    assert len(calls) == SITES


def test_kept_masks_survive_a_state_dict() -> None:
    """A run that is continued reuses the masks it had, and renews them when they are due."""
    first = sparse_model(interval=3)
    assert steps_chosen(first, range(3, 5)) == [3]
    state = find_state(first).context.held.state_dict()
    assert len(state) == 5 and all(mask.dtype == torch.int64 for mask in state.values())

    second = sparse_model(interval=3)
    find_state(second).context.held.load_state_dict(state)
    set_step(second, 5, 100)
    train_step(second, batch(seed=99))
    assert masks_of(second) == masks_of(first)
    assert steps_chosen(second, range(5, 8)) == [6]


def test_without_a_kept_mask_there_is_no_state() -> None:
    model = sparse_model()
    train_step(model, batch())
    assert find_state(model).context.held.state_dict() == {}


@recomputing
def test_a_layer_recomputed_in_part_is_refused(reentrant: bool) -> None:
    """From its middle on nothing tells which forward it belongs to; it would be computed densely, or with other masks."""
    model = sparse_model()
    mlp = model.get_base_model().model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=reentrant)
    loss = model(**batch()).loss
    with pytest.raises(RuntimeError, match="part of layer 1 is recomputed in backward without the layer's beginning"):
        loss.backward()
