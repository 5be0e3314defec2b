"""A sparse step never waits for the GPU once the token partition is there, and never makes tokens × channels of scores.

On a CPU: operators that a GPU would have to be waited for are counted, in forward, backward and recomputation. What
Transformers does on its own is compared with a plain PEFT step. On a GPU CUDA's own check is asked as well.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerState

import sparselora_dist.layers.neurons
import sparselora_kernels.reference.score as reference
from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.layers.estimator import FFNEstimator
from sparselora_dist.layers.ffn import SparseFFN
from sparselora_dist.layers.linear import AttentionChannels
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.sync import masks
from sparselora_dist.sync.masks import MaskSync, Site
from sparselora_kernels import gated_ffn_score, projection_score
from sparselora_kernels.activations import activate
from support.models import ALL_LINEAR, batch, tiny_lora
from support.waits import OURS, Largest, Waits

LAYERS = {group: {"0-2": 0.5} for group in ("ffn", "qk", "vo")}
modes = pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU every reduction compares the ranks' slots at once; on a GPU that is left to the training loop."""
    monkeypatch.setattr(MaskSync, "check", lambda self: self._pending.clear())


def make(reentrant: bool | None = None, sparse: bool = True, **options: Any) -> PeftModel:
    model = tiny_lora(targets=ALL_LINEAR)
    if sparse:
        apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": LAYERS, **options}))
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def step(model: PeftModel, handed: bool = True) -> Waits:
    """What a step waits for; with ``handed``, the partition was made before it, as the training loop does."""
    inputs, state = batch(), find_state(model)
    if handed and state is not None:
        state.context.hand_over(inputs["labels"], partition_tokens(inputs["labels"], inputs["attention_mask"]))
    with Waits() as waits:
        model(**inputs, use_cache=False, num_items_in_batch=20.0).loss.backward()
    return waits


@modes
@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_a_sparse_step_waits_for_nothing(reentrant: bool | None, lora_branch: str) -> None:
    model = make(reentrant, lora_branch=lora_branch)
    waits, plain = step(model), step(make(reentrant, sparse=False))
    assert sorted(selection(model)[1]) == ["ffn", "qk", "vo"], "the step was not sparse"
    assert not waits.ours, waits.ours
    assert not waits.all - plain.all, waits.all - plain.all


def test_kept_masks_and_local_choice_wait_for_nothing() -> None:
    model = make(interval=2, mask_sync="local")
    for _ in range(3):
        assert not step(model).ours


@pytest.mark.parametrize("enabled", [True, False])
def test_labels_on_the_device_cost_one_wait(enabled: bool) -> None:
    assert step(make(enabled=enabled), handed=False).ours == Counter({"tolist": 1})


def test_a_partition_belongs_to_one_forward() -> None:
    """Whoever forgets to hand one over gets the right one, made anew."""
    model, first, second = make(), batch(), batch(seed=1)
    context = find_state(model).context
    context.hand_over(first["labels"], partition_tokens(second["labels"], second["attention_mask"]))
    expected = []
    for handed in (True, False):
        if handed:
            context.hand_over(first["labels"], partition_tokens(first["labels"], first["attention_mask"]))
        expected.append(model(**first).loss)
        assert context.last.partition.dense.tolist() == partition_tokens(first["labels"]).dense.tolist()
    assert torch.equal(*expected)
    context.hand_over(first["labels"], partition_tokens(first["labels"], first["attention_mask"]))
    model(**second)
    wanted = partition_tokens(second["labels"], second["attention_mask"])
    assert context.last.partition.context.tolist() == wanted.context.tolist()


BAD: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x[0, 0]),
    "tolist": lambda x: x[0].tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: x.detach().numpy(),
    "mask": lambda x: x[x[:, 0] > 0],
    "masked write": lambda x: x.clone().index_put_((x[:, 0] > 0,), torch.zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: x.repeat_interleave(torch.ones(x.shape[0], dtype=torch.int64), 0),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
}


@pytest.mark.parametrize(
    ("where", "how"), [*((SparseFFN, how) for how in BAD), (AttentionChannels, "item"), (AttentionChannels, "mask")]
)
def test_the_check_sees_a_wait(where: type, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = where._select

    def select(self: Any, x: Tensor, found: Any) -> Any:
        BAD[how](x)
        return original(self, x, found)

    monkeypatch.setattr(where, "_select", select)
    assert step(make()).ours


class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, how: str) -> Tensor:
        ctx.how = how
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        BAD[ctx.how](grad)
        return grad, None


@pytest.mark.parametrize("how", ["item", "mask", "tolist"])
@modes
def test_the_check_sees_a_wait_in_backward(how: str, reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sparselora_dist.layers.neurons.ffn_down
    bad: Any = lambda *args, **options: Bad.apply(original(*args, **options), how)  # noqa: E731
    monkeypatch.setattr(sparselora_dist.layers.neurons, "ffn_down", bad)
    assert step(make(reentrant)).all - step(make(reentrant, sparse=False)).all


@pytest.mark.gpu
def test_cuda_agrees() -> None:
    model = make().cuda()
    host = batch()
    device = torch.device("cuda")
    for number in range(2):  # The first step allocates and loads.
        partition = partition_tokens(host["labels"], host["attention_mask"]).to(device)
        inputs = {name: tensor.to(device) for name, tensor in host.items() if name != "attention_mask"}
        find_state(model).context.hand_over(inputs["labels"], partition)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if number else "default")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(**inputs, use_cache=False, num_items_in_batch=20.0).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w) for w in caught if "synchronizing" in str(w.message) and w.filename.startswith(OURS)]
    assert waits == []


@pytest.mark.gpu
def test_labels_on_the_host_and_the_model_on_a_gpu() -> None:
    model, expected, inputs = make().cuda(), make().cuda(), batch()
    moved = {name: tensor.cuda() for name, tensor in inputs.items()}
    assert torch.equal(model(**moved | {"labels": inputs["labels"]}).loss, expected(**moved).loss)


# --- when the ranks are compared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "expected"), [("next", 3), ("each", 3), ("caller", 0)])
def test_masks_are_compared_when_asked(when: Any, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    model = make(enabled=False)  # Nothing is reduced, so that every call is the context's own.
    monkeypatch.setattr(MaskSync, "check", lambda self: calls.append(1))
    find_state(model).context.check_masks = when
    for _ in range(3):
        model(**batch())
    assert len(calls) == expected


@pytest.mark.parametrize(
    ("deepspeed", "plugin", "when"),
    [(None, None, "caller"), ("ds.json", object(), "each"), (None, object(), "each")],
    ids=["without DeepSpeed", "the Trainer's DeepSpeed", "accelerate's DeepSpeed"],
)
def test_the_trainer_compares_before_it_steps(
    deepspeed: str | None, plugin: object, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed steps inside backward, ahead of the callback: there every forward is compared at its end."""
    calls: list[int] = []
    model, callback = make(enabled=False), SparseLoRACallback()
    args = SimpleNamespace(deepspeed=deepspeed, deepspeed_plugin=plugin)
    monkeypatch.setattr(MaskSync, "check", lambda self: calls.append(1))
    event: Any = (args, TrainerState(), None)
    callback.on_train_begin(*event, model=model)
    assert find_state(model).context.check_masks == when
    model(**batch())
    assert len(calls) == (when == "each")
    callback.on_pre_optimizer_step(*event, model=model)
    assert len(calls) == 1 + (when == "each")
    callback.on_train_end(*event, model=model)
    assert find_state(model).context.check_masks == "next"


def test_nobody_who_compares_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(masks, "_MOST_PENDING", 3)
    calls: list[int] = []
    monkeypatch.setattr(MaskSync, "check", lambda self: (calls.append(len(self._pending)), self._pending.clear()))
    sync = MaskSync("global", 8)
    for _ in range(7):
        sync.reduce(Site(0, "ffn"), _OnAGPU(torch.ones(8)))
    assert calls == [3, 3] and len(sync._pending) == 1


class _OnAGPU(Tensor):
    """Says that it is on another device than the CPU, where nothing is compared at once."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(type="cuda")


def test_what_waits_to_be_compared_is_small() -> None:
    """A whole optimizer step's slots may wait; the payloads that they came in must not."""
    sync = MaskSync("global", 10_000)
    sync.check = lambda: None  # type: ignore[method-assign]
    sync.reduce(Site(0, "ffn"), torch.ones(10_000))
    ((header, _, _),) = sync._pending
    assert header.untyped_storage().nbytes() < 100


# --- scores -----------------------------------------------------------------------------------------------------------


def largest(model: PeftModel, inputs: dict[str, Tensor]) -> int:
    """Elements of the largest fp32 tensor that an FFN estimator makes."""
    sizes = []

    def measured(forward: Callable[..., Tensor], *args: Any) -> Tensor:
        with Largest() as seen:
            result = forward(*args)
        sizes.append(seen.elements)
        return result

    for module in model.modules():
        if isinstance(module, FFNEstimator):
            module.forward = partial(measured, module.forward)  # type: ignore[method-assign]
    model(**inputs)
    assert len(sizes) == 2  # The last layer chooses no neurons.
    return max(sizes)


def test_no_score_tensor_of_tokens_times_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(rows=10, length=60)
    limit = partition_tokens(inputs["labels"], inputs["attention_mask"]).context.numel() * 104
    assert limit > 300 * 104
    assert largest(make(), inputs) < limit

    def plain_formula(*args: Any) -> Tensor:
        return reference.gated_ffn_score(*args[:-1], partial(activate, args[-1]))

    monkeypatch.setattr("sparselora_dist.layers.estimator.gated_ffn_score", plain_formula)
    assert largest(make(), inputs) >= limit, "the check does not see the plain formula"


def test_no_score_tensor_of_tokens_times_channels() -> None:
    x, rows = torch.randn(300, 12), torch.arange(300)
    a, b = torch.randn(4, 12), torch.randn(64, 4)
    for score, naive in ((projection_score, False), (reference.projection_score, True)):
        with Largest() as seen:
            score(x, rows, a, b)
        assert (seen.elements >= 300 * 64) is naive
    pair = (a, b)
    for score, naive in ((gated_ffn_score, False), (reference.gated_ffn_score, True)):
        with Largest() as seen:
            score(x, rows, pair, pair, torch.nn.functional.silu)
        assert (seen.elements >= 300 * 64) is naive
