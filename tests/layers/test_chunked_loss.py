"""Our training loop and our evaluation read no logits: the same loss, gradients and scores, a chunk of logits at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.method.tokens import partition_tokens
from support.compare import assert_close, loss_logits
from support.models import ALL_LINEAR, ATTENTION, FAMILIES, batch, gradients, tiny_base, tiny_lora
from support.waits import Largest, Waits

LAYERS = {"ffn": {"0-2": 0.8}, "qk": {"1-2": 0.5}}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 label rows at a time."""
    monkeypatch.setattr(import_module("sparselora_kernels.label_loss"), "chunk_rows", lambda vocabulary, dtype: 5)


def applied(model: Any, chunked: bool = True, **options: Any) -> Any:
    apply_sparselora(model, SparseLoRAConfig.from_dict({"enabled": False, **options}))
    find_state(model).context.chunk_loss = chunked
    return model


def label_rows(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def check(expected: PeftModel, got: PeftModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Same loss and gradients; gives the second's output."""
    outs = [model(**inputs, **options) for model in (expected, got)]
    for out in outs:
        out.loss.backward()
    assert_close("loss", outs[0].loss, outs[1].loss, rtol=1e-6, atol=0.0)
    reference, mine = gradients(expected), gradients(got)
    assert reference and reference.keys() == mine.keys()
    for name, gradient in reference.items():
        assert_close(name, gradient, mine[name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    return outs[1]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7.0)], ids=["mean", "number", "tensor"])
def test_it_is_transformers_loss(family: str, items: Any) -> None:
    options = {} if items is None else {"num_items_in_batch": items}
    out = check(tiny_lora(family), applied(tiny_lora(family)), batch(), **options)
    assert out.logits.shape == () and out.logits.dtype == torch.float32
    assert_close("sum", out.loss * (label_rows(batch()) if items is None else 7), out.logits)


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
def test_sparse_and_checkpointed(reentrant: bool | None) -> None:
    models = []
    for chunked in (False, True):
        model = applied(tiny_lora(targets=ALL_LINEAR), chunked, enabled=True, layers=LAYERS)
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        models.append(model)
    check(*models, batch())


def test_tied_embeddings() -> None:
    expected, model = (tiny_lora("qwen3", tie_word_embeddings=True) for _ in range(2))
    check(expected, applied(model), batch())


@pytest.mark.parametrize("how", ["stored", "autocast"])
def test_bf16(how: str) -> None:
    """Against a head that gives the rows' logits: one rounding of the hidden states' gradient more."""
    results = []
    for chunked in (False, True):
        model = applied(tiny_lora(dtype=torch.bfloat16 if how == "stored" else torch.float32), chunked)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = model(**batch()).loss
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, expected), (got, mine) = results
    assert_close("loss", loss, got, rtol=1e-6, atol=0.0)
    for name, gradient in expected.items():
        assert_close(name, gradient, mine[name], rtol=2**-5, atol=2**-5 * float(gradient.abs().max()))


def test_no_label_at_all_gives_zero_and_reaches_every_adapter() -> None:
    model, inputs = applied(tiny_lora()), batch()
    inputs["labels"][:] = -100
    loss = model(**inputs, num_items_in_batch=1).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("chunked", [True, False])
def test_no_logits_of_all_labels_are_made(chunked: bool) -> None:
    model, inputs, sizes = (
        applied(tiny_lora(), chunked),
        batch(rows=10, length=60),
        [],
    )  # More labels than the head is wide.
    head = model.get_base_model().lm_head
    forward = head.forward

    def measured(x: Tensor) -> Tensor:
        with Largest() as seen:
            result = forward(x)
        sizes.append(seen.elements)
        return result

    head.forward = measured
    model(**inputs).loss.backward()
    assert len(sizes) == 1
    assert (sizes[0] < label_rows(inputs) * 96) is chunked


def test_it_waits_for_nothing() -> None:
    model, inputs = applied(tiny_lora()), batch()
    find_state(model).context.hand_over(inputs["labels"], partition_tokens(inputs["labels"], inputs["attention_mask"]))
    with Waits() as waits:
        model(**inputs, use_cache=False, num_items_in_batch=20.0).loss.backward()
    assert not waits.ours, waits.ours


def lora_on_the_head() -> PeftModel:
    return tiny_lora(targets=[*ATTENTION, "lm_head"])


def trained_head() -> PeftModel:
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_base(), lora).train()


def thawed_head() -> PeftModel:
    model = tiny_lora()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    return model


changed_heads = pytest.mark.parametrize("make", [lora_on_the_head, trained_head, thawed_head])


@changed_heads
def test_a_head_that_is_trained_gives_its_logits(make: Callable[[], PeftModel]) -> None:
    out = check(make(), applied(make()), batch())
    assert out.logits.shape == (1, label_rows(batch()), 96)


def test_whole_where_the_caller_wants_logits() -> None:
    model = applied(tiny_lora())
    assert model.eval()(**batch()).logits.shape == (4, 24, 96)
    model.train()
    inputs = batch()
    del inputs["labels"]
    assert model(**inputs, logits_to_keep=3).logits.shape == (4, 3, 96)


def test_a_copy_and_a_removal() -> None:
    model = applied(tiny_lora())
    twin = copy.deepcopy(model)
    find_state(model).context.chunk_loss = False
    assert twin(**batch()).logits.shape == () and model(**batch()).logits.dim() == 3
    remove_sparselora(twin)
    assert "forward" not in twin.get_base_model().lm_head.__dict__
    assert torch.equal(twin(**batch()).logits, tiny_lora()(**batch()).logits)


# --- evaluation ------------------------------------------------------------------------------------------------------


def scores(model: PeftModel, inputs: dict[str, Tensor]) -> Any:
    find_state(model).context.evaluating = True
    with torch.no_grad():
        return model.eval()(**inputs, num_items_in_batch=1)


def expected_scores(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits = loss_logits(model.eval()(**inputs).logits, inputs["labels"])
    labels = partition_tokens(inputs["labels"]).loss_labels
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack([losses, (logits.argmax(1) == labels).float()], 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"skip_unused_logits": False}, {"enabled": True, "layers": LAYERS}], ids=str)
def test_scores_of_every_label(family: str, options: dict[str, Any]) -> None:
    inputs = batch()
    expected, out = expected_scores(tiny_lora(family), inputs), scores(applied(tiny_lora(family), **options), inputs)
    assert_close("losses", expected[:, 0], out.logits[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(expected[:, 1], out.logits[:, 1])
    assert_close("loss", expected[:, 0].sum(), out.loss)


@changed_heads
def test_scores_of_a_head_that_is_trained(make: Callable[[], PeftModel]) -> None:
    expected, out = expected_scores(make(), batch()), scores(applied(make()), batch())
    assert_close("losses", expected[:, 0], out.logits[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(expected[:, 1], out.logits[:, 1])


def test_a_batch_without_labels_has_no_scores() -> None:
    inputs = batch()
    inputs["labels"][:] = -100
    out = scores(applied(tiny_lora()), inputs)
    assert out.logits.shape == (0, 2) and out.loss.item() == 0.0


def test_training_goes_on_as_before() -> None:
    model = applied(tiny_lora())
    find_state(model).context.evaluating = True
    check(tiny_lora(), model, batch())
