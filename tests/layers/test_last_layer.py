"""The last decoder layer only where the loss reads logits: the same step, with less of it computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sparselora_kernels.flop_counts  # noqa: F401  (of the operations that FlopCounterMode cannot see into)
from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.train.metrics import flop_model
from support.compare import assert_close, loss_logits
from support.models import ALL_LINEAR, ATTENTION, FAMILIES, batch, gradients, tiny_base, tiny_lora

LAYERS = {"ffn": {"0-2": 0.8}, "qk": {"1-2": 0.5}, "vo": {"1-2": 0.5}}
LAST = 2
kinds = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
checkpointing = pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])


def make(
    family: str = "llama",
    sparse: bool = False,
    reentrant: bool | None = None,
    targets: list[str] = ALL_LINEAR,
    trimmed: bool = True,
    **shape: Any,
) -> PeftModel:
    model = tiny_lora(family, targets, **shape)
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": LAYERS, "enabled": sparse}))
    if not trimmed:
        find_state(model).context.last_layer = None
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def data(left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Padding on one side; no label in one row."""
    made = batch(seed=seed)
    if left:
        real = made["attention_mask"].sum(1).tolist()
        made = {k: torch.stack([row.roll(24 - n) for row, n in zip(t, real)]) for k, t in made.items()}
        assert made["attention_mask"][1, 0] == 0 and made["attention_mask"][1, -1] == 1
    made["labels"][2] = -100
    return made


def label_rows(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def rows_reaching(model: PeftModel, *names: str, layer: int = LAST) -> dict[str, list[int]]:
    """Rows that each of the named matrices of a layer is run at, a number per forward."""
    seen: dict[str, list[int]] = {name: [] for name in names}
    found = model.get_base_model().model.layers[layer]
    for name in names:
        outer = getattr(found.mlp if name in ALL_LINEAR[4:] else found.self_attn, name)
        outer.register_forward_pre_hook(lambda m, args, to=seen[name]: to.append(args[0].shape[:-1].numel()))
    return seen


def check(expected: PeftModel, got: PeftModel, inputs: dict[str, Tensor], **options: Any) -> None:
    """Same loss, logits and gradients, fp32 sums aside."""
    outs = [model(**inputs, **options) for model in (expected, got)]
    for out in outs:
        out.loss.backward()
    assert_close("loss", outs[0].loss, outs[1].loss, rtol=1e-6, atol=1e-6)
    assert_close("logits", *(loss_logits(out.logits, inputs["labels"]) for out in outs), rtol=1e-5, atol=1e-5)
    reference, mine = gradients(expected), gradients(got)
    assert reference and reference.keys() == mine.keys()
    for name, gradient in reference.items():
        assert_close(name, gradient, mine[name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


# --- the same step ---------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_layer(family: str, sparse: bool, left: bool) -> None:
    model, inputs = make(family, sparse), data(left)
    rows = rows_reaching(model, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    check(make(family, sparse, trimmed=False), model, inputs)
    n = label_rows(inputs)
    assert 0 < n < 48
    assert rows == {name: [96 if name in ("k_proj", "v_proj") else n] for name in rows}
    chosen = {layer: sorted(groups) for layer, groups in selection(model).items()}
    assert chosen == ({0: ["ffn"], 1: ["ffn", "qk", "vo"], 2: ["qk", "vo"]} if sparse else {})


def test_the_flops_that_it_saves_are_those_of_the_model() -> None:
    """As PyTorch counts them, forward and backward; both sides leave out the LM head's."""
    inputs = batch(padding=False)
    counted = []
    for trimmed in (False, True):
        model = make("qwen2", trimmed=trimmed)
        with FlopCounterMode(display=False) as counter:
            model(**inputs).loss.backward()
        counted.append(counter.get_total_flops())
    flops, n = flop_model(model, find_state(model)), label_rows(inputs)
    head = (96 - n) * 4 * 48 * 96
    saved = flops.executed(96, 0, 24) - flops.executed(96, 0, 24, logits=n) - head
    assert saved > 0.05 * flops.dense(96, 24)
    assert counted[0] - counted[1] == saved


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_plain_peft(family: str) -> None:
    check(tiny_lora(family, ALL_LINEAR), make(family), data())


@kinds
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("targets", [ATTENTION, ["up_proj"]], ids=["lora-attention", "lora-up"])
def test_checkpointing_recomputes_the_same_rows(sparse: bool, reentrant: bool, targets: list[str]) -> None:
    model, inputs = make("qwen3", sparse, reentrant, targets), data()
    rows = rows_reaching(model, "q_proj", "k_proj", "gate_proj")
    check(make("qwen3", sparse, targets=targets, trimmed=False), model, inputs)
    n = label_rows(inputs)
    assert rows == {"q_proj": [n, n], "k_proj": [96, 96], "gate_proj": [n, n]}


@kinds
@checkpointing
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_forwards_pending(sparse: bool, reentrant: bool | None, order: tuple[int, int]) -> None:
    """Recomputation finds the rows of its own micro-batch."""
    inputs = [data(seed=1), batch(rows=3, length=17, seed=2)]
    model, expected = make("llama", sparse, reentrant), make("llama", sparse, trimmed=False)
    losses = [model(**one).loss for one in inputs]
    for number in order:
        losses[number].backward()
        expected(**inputs[number]).loss.backward()
    mine = gradients(model)
    for name, gradient in gradients(expected).items():
        assert_close(name, gradient, mine[name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


@kinds
@checkpointing
def test_no_label_at_all_gives_zero_and_reaches_every_adapter(sparse: bool, reentrant: bool | None) -> None:
    model, inputs = make("qwen2", sparse, reentrant), data()
    inputs["labels"][:] = -100
    rows = rows_reaching(model, "q_proj", "gate_proj")
    loss = model(**inputs, num_items_in_batch=1).loss
    loss.backward()
    assert loss.item() == 0.0 and rows["q_proj"][0] == rows["gate_proj"][0] == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@kinds
def test_biases_and_autocast(sparse: bool) -> None:
    """A bias of o belongs to positions that nobody reads as well; bf16 stays bf16."""
    shape = {"attention_bias": True, "mlp_bias": True}
    with torch.autocast("cpu", torch.bfloat16):
        outs = [make(sparse=sparse, trimmed=trimmed, **shape)(**data()) for trimmed in (False, True)]
    assert_close("logits", outs[0].logits, outs[1].logits, rtol=3e-2, atol=3e-2)
    check(make(sparse=sparse, trimmed=False, **shape), make(sparse=sparse, **shape), data())


def test_a_deep_copy_and_a_removal() -> None:
    model, inputs = make(sparse=True), data()
    twin = copy.deepcopy(model)
    rows = rows_reaching(model, "gate_proj")
    check(make(sparse=True, trimmed=False), twin, inputs)
    assert find_state(twin).context is not find_state(model).context and rows["gate_proj"] == []
    remove_sparselora(model)
    check(tiny_lora(targets=ALL_LINEAR), model, inputs)
    assert rows["gate_proj"] == [96]


# --- when it is off --------------------------------------------------------------------------------------------------


def whole(model: PeftModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The output of a forward that must run the last layer at every position."""
    rows = rows_reaching(model, "q_proj", "o_proj", "gate_proj")
    out = model(**inputs, **options)
    assert rows == {name: [96] for name in rows}
    return out


@pytest.mark.parametrize("what", ["hidden_states", "attentions"])
def test_off_when_somebody_reads_the_layer(what: str) -> None:
    model, plain = (f(targets=ALL_LINEAR, attn_implementation="eager") for f in (make, tiny_lora))
    options = {f"output_{what}": True}
    got, expected = whole(model, data(), **options), plain(**data(), **options)
    assert_close(what, expected[what][-1], got[what][-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["hidden_states", "attentions"])
def test_off_when_the_config_asks_for_it(what: str) -> None:
    """PEFT's wrapper hides this setting, so without it."""
    models = [tiny_base(attn_implementation="eager").requires_grad_(False).train() for _ in range(2)]
    apply_sparselora(models[1], SparseLoRAConfig.from_dict({"enabled": False}))
    for model in models:
        setattr(model.config, f"output_{what}", True)
    expected, got = (model(**data())[what][-1] for model in models)
    assert_close(what, expected, got, rtol=1e-5, atol=1e-5)


def test_off_where_the_caller_chose_the_logits() -> None:
    whole(make(sparse=False), data(), logits_to_keep=24)


def test_off_in_evaluation_and_with_shifted_labels_and_without_labels() -> None:
    whole(make().eval(), data())
    inputs = data()
    labels = inputs.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    whole(make(), inputs, labels=None, shift_labels=shifted)
    whole(make(), inputs)


def test_off_without_skip_unused_logits() -> None:
    model = tiny_lora(targets=ALL_LINEAR)
    apply_sparselora(model, SparseLoRAConfig.from_dict({"enabled": False, "skip_unused_logits": False}))
    whole(model, data())


@checkpointing
def test_the_inner_model_alone_is_whole(reentrant: bool | None) -> None:
    """Nobody said which positions are read; plain LoRA must not be refused for that in recomputation either."""
    inputs = data()
    inputs.pop("labels")
    grads = []
    for model in (tiny_lora(targets=ALL_LINEAR), make(reentrant=reentrant)):
        model.get_base_model().model(**inputs).last_hidden_state.square().sum().backward()
        grads.append(gradients(model))
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert_close(name, gradient, grads[1][name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
