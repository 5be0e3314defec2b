"""``torch.compile`` of a sparse model: one graph, no break in a layer, nothing compiled again when the labels move."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.utils import counters

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.layers.hooks import LayerHook
from support.models import ALL_LINEAR, batch, gradients, tiny_lora

LAYERS = {"ffn": {"0-2": 0.8}, "qk": {"1": 0.5}, "vo": {"1": 0.5}}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest's handlers would take the tracer's own record of every tensor, which is most of the time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(checkpointing: bool = False, **options: object) -> PeftModel:
    model = tiny_lora("qwen3", ALL_LINEAR, use_cache=False)
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": LAYERS, **options}))
    if checkpointing:
        # Not PEFT's way, whose hook on the embedding breaks the graph, also of plain LoRA.
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.get_base_model().disable_input_require_grads()
    return model


def moved(seed: int) -> dict[str, Tensor]:
    """A batch of the same shape whose completions begin elsewhere: other numbers of dense, context and label tokens."""
    data = batch(seed=seed)
    for row, labels in enumerate(data["labels"]):
        begin = 4 + (5 * seed + row) % 9
        labels[begin:16] = data["input_ids"][row, begin:16]
    return data


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_one_graph_for_every_batch(checkpointing: bool) -> None:
    eager, model = made(checkpointing), made(checkpointing)
    compiled = torch.compile(model, backend="aot_eager")
    tokens = set()
    for seed in range(3):
        data = moved(seed)
        wanted, got = eager(**data).loss, compiled(**data).loss
        wanted.backward(), got.backward()
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        for (name, one), other in zip(gradients(eager).items(), gradients(model).values(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=name)
        chosen = selection(model)
        assert sorted(chosen) == [0, 1] and sorted(chosen[1]) == ["ffn", "qk", "vo"]
        for layer, groups in selection(eager).items():
            for group, mask in groups.items():
                assert torch.equal(mask, chosen[layer][group])
        state = find_state(model).context.last
        tokens.add((state.partition.dense.numel(), state.partition.context.numel(), state.loss.rows.numel()))
        eager.zero_grad(), model.zero_grad()
        assert graphs() == 1
    assert len({dense for dense, _, _ in tokens}) == 3, "the batches do not differ"
    assert not counters["graph_break"], dict(counters["graph_break"])


def test_a_change_of_the_schedule_costs_one_graph() -> None:
    model = made(start_step=1)
    compiled = torch.compile(model, backend="eager")
    context = find_state(model).context
    for step in range(3):
        context.set_step(step, 3)
        compiled(**moved(step)).loss.backward()
        assert context.was_sparse == (step > 0)
    assert graphs() == 2 and not counters["graph_break"]


def test_a_layer_recomputed_in_a_graph_of_its_own_is_refused() -> None:
    """Which forward the layer belongs to would be lost, and the masks with it."""
    hook = LayerHook(find_state(made()).context, 1)

    def layer(x: Tensor) -> Tensor:
        hook(torch.nn.Identity(), (x,), {})
        return 2 * x

    compiled = torch.compile(layer, backend="eager")
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(compiled(x), 2 * x)
    x.register_hook(compiled)
    with pytest.raises(RuntimeError, match="layer 1 is compiled apart from the model and recomputed"):
        x.sum().backward()


def test_a_copy_and_a_pickled_model_choose_for_themselves() -> None:
    model = made()
    expected = model(**moved(0)).loss
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "sparse_estimator" in name or ".estimator." in name:
                parameter.normal_()
    apart = torch.compile(other, backend="eager")(**moved(0)).loss
    assert not torch.equal(apart, expected)
    torch.testing.assert_close(apart, other(**moved(0)).loss)
    again = pickle.loads(pickle.dumps(model))
    modules = [module for one in (model, other, again) for module in one.modules()]
    numbers = [module.handle.number for module in modules if hasattr(module, "handle")]
    assert len(set(numbers)) == len(numbers) == 9
