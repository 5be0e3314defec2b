"""Which forwards take the masks of which: those that see the same tokens, and those of one scope."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_dist import selection, set_step, shared_masks
from sparselora_dist.apply import find_state
from support.applied import assert_identical, outputs, sparse_model
from support.models import batch, tiny_lora

Masks = dict[tuple[int, str], Tensor] | None


def watched(**options: Any) -> tuple[Any, Callable[..., Masks]]:
    """A sparse model, and a function that runs a forward of it and gives the masks that it used, ``None`` if dense."""
    model = sparse_model(**options)
    context, seen = find_state(model).context, []

    def look(*_: Any) -> None:
        running = context.active(0, "ffn")
        seen.append(running and running.masks)

    model.get_output_embeddings().register_forward_pre_hook(look)

    def run(data: dict[str, Tensor], gradients: bool = True, adapter: bool = True) -> Masks:
        with torch.set_grad_enabled(gradients), nullcontext() if adapter else model.disable_adapter():
            model(**data)
        return seen.pop()

    return model, run


def same(one: Masks, other: Masks) -> bool:
    assert one and other and one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def copied(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in data.items()}


def reference(run: Callable[..., Masks], data: dict[str, Tensor]) -> Masks:
    return run(data, gradients=False, adapter=False)


def test_a_reference_takes_the_masks_of_its_policy() -> None:
    model, run = watched()
    data = batch()
    policy = run(data)
    assert same(policy, reference(run, data))
    assert torch.equal(model(**data).logits, model(**data).logits)
    # Elsewhere in memory it is another batch, for which the base model chooses otherwise.
    assert not same(policy, reference(run, copied(data)))


def test_without_gradients_the_policy_is_the_same_function() -> None:
    model, data = sparse_model(), batch()
    expected = model(**data)
    with torch.no_grad():
        got = model(**data)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
    model.eval()
    assert model(**data).logits.shape == (4, 24, 96), "evaluation is dense and whole"


def test_a_policy_takes_the_masks_of_the_reference_before_it_once() -> None:
    _, run = watched()
    first, second = batch(), batch(seed=5)
    references = [reference(run, data) for data in (first, second)]
    assert same(references[0], run(first)) and same(references[1], run(second))
    again = run(first)
    assert not same(references[0], again), "it chooses anew, however often it is trained on one batch"
    assert same(again, reference(run, first))
    assert same(again, run(copied(first)))


def test_the_labels_may_be_made_anew() -> None:
    """As TRL's KTO makes them before each of the two forwards."""
    _, run = watched()
    kl, policy = batch(), batch(seed=5)
    chosen = run(kl, gradients=False)
    run(policy)
    assert same(chosen, reference(run, {**kl, "labels": kl["labels"].clone()}))


def test_memory_that_is_written_to_is_another_batch() -> None:
    _, run = watched()
    data = batch()
    policy = run(data)
    data["input_ids"].copy_(batch(seed=9)["input_ids"])
    assert not same(policy, reference(run, data))


@pytest.mark.parametrize("schedule", [True, False])
def test_another_step_chooses_anew(schedule: bool) -> None:
    """Also where nothing drives the schedule, and the loop computes the reference first."""
    model, run = watched()
    data = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before: Masks = None
    for step in range(3):
        if schedule:
            set_step(model, step, 3)
        chosen = run(data, gradients=False)
        assert same(chosen, run(data))
        if step:
            assert not same(chosen, before)
        before = chosen
        model(**data).loss.backward()
        optimizer.step()


def test_few_forwards_are_remembered() -> None:
    _, run = watched()
    data = [batch(seed=seed) for seed in range(9)]
    policies = [run(one) for one in data]
    assert same(policies[1], reference(run, data[1]))
    assert not same(policies[0], reference(run, data[0]))


def test_a_reference_in_inference_mode_serves_the_policy() -> None:
    model, data = sparse_model(), batch()
    with torch.inference_mode():
        expected = model(**data).loss
    loss = model(**data).loss
    loss.backward()
    assert torch.equal(loss.detach(), expected.clone())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_knows_masks_that_were_taken(reentrant: bool) -> None:
    def step(checkpointing: bool) -> tuple:
        model, data = sparse_model(), batch()
        with torch.no_grad(), model.disable_adapter():
            model(**data)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        result = outputs(model, data)
        with torch.no_grad():
            model(**data)
        return result

    assert_identical(step(False), step(True))


def test_kept_masks_are_those_of_the_policies() -> None:
    """With ``interval`` 2; a forward without gradients takes what is kept, and what it chooses itself is not kept."""
    model, run = watched(interval=2)
    set_step(model, 0, 8)
    other = run(batch(seed=5), gradients=False)
    policy = run(batch())
    assert not same(other, policy)
    set_step(model, 1, 8)
    assert same(policy, reference(run, batch(seed=6))) and same(policy, run(batch(seed=7)))
    set_step(model, 2, 8)
    data = batch(seed=8)
    chosen = reference(run, data)
    assert not same(policy, chosen) and same(chosen, run(data))
    set_step(model, 3, 8)
    assert same(chosen, run(batch(seed=9))), "what the policy took is kept"


def test_the_token_partition_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what a forward waits for the device for."""
    from sparselora_dist.layers import context as module

    made: list[Tensor] = []
    plain = module.partition_tokens
    monkeypatch.setattr(
        module, "partition_tokens", lambda labels, *a, **k: made.append(labels) or plain(labels, *a, **k)
    )
    _, run = watched()
    data = batch()
    run(data), reference(run, data)
    assert len(made) == 1
    run({**data, "attention_mask": torch.ones_like(data["attention_mask"])}, gradients=False)
    assert len(made) == 2, "another attention mask makes other tokens"


def test_dense_references_are_asked_for() -> None:
    model, run = watched(reference="dense")
    data = batch()
    assert run(data) and reference(run, data) is None
    with torch.no_grad():
        expected = tiny_lora(targets=model.peft_config["default"].target_modules)(**data).logits
        torch.testing.assert_close(model(**data).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_generation_shares_its_masks() -> None:
    """As GRPO: forwards without gradients in chunks, then so many micro-batches, in another order."""
    model, run = watched()
    sharing = find_state(model).context.sharing
    sharing.reset(generation=2)
    before = run(batch(seed=20))
    chunks = [run(batch(seed=seed), gradients=False) for seed in (1, 2)]
    chunks += [reference(run, batch(seed=seed)) for seed in (1, 2)]
    rows = [run(batch(seed=seed)) for seed in (3, 4)]
    assert not same(before, chunks[0]) and all(same(chunks[0], other) for other in chunks + rows)
    after = run(batch(seed=5))
    assert not same(rows[0], after), "nothing stale stays for good"
    following = run(batch(seed=6), gradients=False)
    assert not same(chunks[0], following) and same(following, run(batch(seed=7)))
    # Another one begins, though this one was to have another micro-batch (a resumed run).
    assert not same(following, run(batch(seed=8), gradients=False))


@pytest.mark.parametrize("dense", [True, False])
def test_a_generation_stays_as_it_began(dense: bool) -> None:
    """The schedule may switch between the old log-probabilities and the last micro-batch on them."""
    model, run = watched(**{"start_step": 2} if dense else {"end_step": 2})
    find_state(model).context.sharing.reset(generation=2)
    set_step(model, 1, 8)
    assert (run(batch(seed=1), gradients=False) is None) == dense
    for step in (1, 2):
        set_step(model, step, 8)
        assert (run(batch(seed=2 + step)) is None) == dense
        assert bool(selection(model)) != dense
    assert (run(batch(seed=5)) is None) != dense, "then the schedule rules again"


def test_shared_masks_in_a_loop_of_ones_own() -> None:
    model, run = watched()
    before = run(batch(seed=1))
    with shared_masks(model):
        old = run(batch(seed=2), gradients=False)
        for step in range(3):
            set_step(model, step, 3)
            assert same(old, run(batch(seed=3 + step)))
        with pytest.raises(RuntimeError, match="already open"), shared_masks(model):
            pass
        assert same(old, run(batch(seed=8)))
    assert not same(old, run(batch(seed=8))) and not same(old, before)
    with pytest.raises(ValueError, match="not sparse"), shared_masks(tiny_lora()):
        pass
