"""Other layouts than Llama's: one matrix for q, k and v or for gate and up, and FFNs without a gate.

What they compute is held for every model type by ``tests/layouts/test_every_type.py``, and under the engines by
``tests/engines``; here is what differs from layer to layer in how a model is used.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparselora_kernels.flop_counts  # noqa: F401  (of the operations that FlopCounterMode cannot see into)
from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.codecs import NF4Codec
from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_dist.codecs.plain import PlainCodec
from sparselora_dist.io.manifest import read_safetensors
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.io.weights import CheckpointWeights, ModelWeights
from sparselora_dist.layers.lora import set_base_linear
from sparselora_dist.layouts import base_linear, decoder_layers
from sparselora_dist.method.channels import TRANSPOSED
from sparselora_dist.train.metrics import flop_model
from sparselora_dist.train.moments import second_moments
from support.compare import assert_close, loss_logits
from support.models import FUSED, batch, gradients, tiny_base, tiny_lora
from support.oracle import context_tokens, train_step

LAYERS = {"ffn": {"0-2": 0.75}, "qk": {"0-2": 0.5}, "vo": {"0-2": 0.5}}
layouts = pytest.mark.parametrize("family", FUSED)


def sparse(model: Any, **options: Any) -> Any:
    return apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": LAYERS, "rank": 4, **options}))


def same(expected: PeftModel, got: PeftModel, inputs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Loss, logits where they are read, and all gradients."""
    steps = [train_step(model, inputs) for model in (expected, got)]
    assert_close("loss", steps[0].loss, steps[1].loss, rtol=rtol, atol=1e-6)
    assert_close("logits", *(loss_logits(step.logits, inputs["labels"]) for step in steps), rtol=rtol, atol=rtol)
    assert steps[0].gradients.keys() == steps[1].gradients.keys() and steps[0].gradients
    for name, gradient in steps[0].gradients.items():
        assert_close(name, gradient, steps[1].gradients[name], rtol=rtol, atol=rtol * float(gradient.abs().max()))


@layouts
def test_lora_branches_that_keep_all_neurons(family: str) -> None:
    """``lora_branch="dense"``: the frozen branch alone loses neurons, biases included."""
    model, inputs = tiny_lora(family, FUSED[family]), batch(padding=False)
    expected = copy.deepcopy(model)
    ffn_only = {"ffn": {"0-2": 0.75}}
    sparse(model, layers=ffn_only, lora_branch="dense")
    got = train_step(model, inputs)
    context, _ = context_tokens(inputs)
    for index, chosen in selection(model).items():
        layer = decoder_layers(expected)[index]
        assert layer.ffn is not None
        for name in (name for name in layer.ffn.names):
            frozen = layer.matrix(name)
            mask = torch.zeros(layer.channels["ffn"])
            mask[chosen["ffn"]] = 1
            kept = torch.where(context[..., None], mask, torch.ones_like(mask))
            if name == "down_proj":
                frozen.register_forward_pre_hook(lambda m, args, kept=kept: (args[0] * kept,))
            else:
                kept = kept.repeat(1, 1, frozen.out_features // len(mask))
                frozen.register_forward_hook(lambda m, args, y, kept=kept: y * kept)
    wanted = train_step(expected, inputs)
    assert_close("loss", wanted.loss, got.loss, rtol=1e-5)
    for name, gradient in wanted.gradients.items():
        assert_close(name, gradient, got.gradients[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@layouts
def test_nf4_halves_and_heads_are_those_of_the_decoded_matrices(family: str) -> None:
    stored, plain = tiny_lora(family, FUSED[family]), tiny_lora(family, FUSED[family])
    for ours, theirs in zip(decoder_layers(stored), decoder_layers(plain)):
        for name in ours.names:
            linear: Any = ours.matrix(name)
            transposed = name in TRANSPOSED
            weight = linear.weight.detach().t().contiguous() if transposed else linear.weight.detach()
            codec = NF4Codec()
            parts = {k: nn.Parameter(v, requires_grad=False) for k, v in codec.encode(weight, 0).items()}
            frozen = FrozenLinear(
                linear.in_features, linear.out_features, linear.bias, codec, parts, transposed=transposed
            )
            set_base_linear(*ours.slot(name), frozen)
            theirs.matrix(name).weight.data.copy_(frozen.matrix(frozen.parts, torch.float32))
    sparse(stored)
    sparse(plain)
    same(plain, stored, batch())
    for layer, chosen in selection(plain).items():
        assert all(torch.equal(kept, selection(stored)[layer][group]) for group, kept in chosen.items())


@layouts
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    model = sparse(tiny_lora(family, FUSED[family]))
    expected = copy.deepcopy(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(expected, model, batch())


@layouts
def test_it_compiles_without_a_graph_break(family: str) -> None:
    model = sparse(tiny_lora(family, FUSED[family]))
    expected, inputs = copy.deepcopy(model), batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for one in (compiled, expected):
        loss = one(**inputs, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert_close("loss", losses[1], losses[0], rtol=1e-5)
    mine = gradients(model)
    for name, gradient in gradients(expected).items():
        assert_close(name, gradient, mine[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@layouts
def test_the_last_layer_saves_what_the_flop_model_says(family: str) -> None:
    """As PyTorch counts them, forward and backward; both sides leave out the LM head's."""
    inputs = batch(padding=False)
    counted = []
    for trimmed in (False, True):
        model = sparse(tiny_lora(family, FUSED[family]), enabled=False)
        if not trimmed:
            find_state(model).context.last_layer = None
        with FlopCounterMode(display=False) as counter:
            model(**inputs).loss.backward()
        counted.append(counter.get_total_flops())
    flops, n = flop_model(model, find_state(model)), int((inputs["labels"][:, 1:] != -100).sum())
    saved = flops.executed(96, 0, 24) - flops.executed(96, 0, 24, logits=n) - (96 - n) * 4 * 48 * 96
    assert counted[0] - counted[1] == saved > 0.05 * flops.dense(96, 24)


@layouts
def test_merging_unloading_and_saving_are_the_familys_own(family: str, tmp_path: Path) -> None:
    plain, model = tiny_lora(family, FUSED[family]), sparse(tiny_lora(family, FUSED[family]))
    train_step(model, batch())
    base = tiny_base(family)
    assert {k: v.shape for k, v in model.get_base_model().state_dict().items() if "lora" not in k}.keys() == {
        k: v for k, v in plain.get_base_model().state_dict().items() if "lora" not in k
    }.keys()
    expected, merged = plain.merge_and_unload(), model.merge_and_unload()
    own = merged.state_dict()
    assert own.keys() == base.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert_close(name, value, own[name], rtol=1e-6, atol=1e-6)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]


@layouts
def test_an_adapter_that_comes_later_is_right(family: str) -> None:
    """Without a LoRA layer around it at first."""
    base = tiny_base(family).requires_grad_(False)
    plain, model = copy.deepcopy(base), sparse(base, layers={group: {"0-2": 0.0} for group in LAYERS})
    lora = LoraConfig(r=4, target_modules=FUSED[family], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = []
    for one in (plain, model):
        torch.manual_seed(0)
        adapted.append(get_peft_model(one, lora).train())
    same(*adapted, batch())
    assert set(selection(adapted[1])[0]) == set(LAYERS)
    remove_sparselora(adapted[1])
    assert all(
        type(base_linear(layer.linear(n))) is nn.Linear for layer in decoder_layers(adapted[1]) for n in layer.names
    )
    same(*adapted, batch())


@layouts
def test_matrices_inside_others_are_read_alike_from_a_model_and_from_its_files(family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    base.save_pretrained(tmp_path)
    layers = decoder_layers(base)
    plain = PlainCodec(torch.float32)
    sources = ModelWeights(base), CheckpointWeights(TensorFiles.of_model(tmp_path), plain, torch.float32, layers)
    scored = [(layer.index, name) for layer in layers for group in LAYERS for name in layer.scored(group)]
    assert len(scored) == len(set(scored)) == 3 * (5 if family == "phi3" else 4)
    assert len({sources[0].mark(*matrix) for matrix in scored}) == len(scored)
    for matrix in scored:
        mine, theirs = (source.get(*matrix) for source in sources)
        assert torch.equal(mine, theirs)
        assert {tuple(mine.shape)} == {source.shape(*matrix) for source in sources}
        assert sources[0].mark(*matrix) == sources[1].mark(*matrix)
    moments = second_moments(base, [batch()])
    assert set(moments) == set(scored) and all(moment.shape == (48, 48) for moment in moments.values())


def test_factors_have_the_names_of_what_they_are_factors_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path))
    sparse(tiny_lora("phi3", FUSED["phi3"]))
    (file,) = (tmp_path / "factors").iterdir()
    tensors, _ = read_safetensors(file)
    names = ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert set(tensors) == {f"layers.{i}.{name}.{side}" for i in range(3) for name in names for side in "ab"}
    model = sparse(tiny_lora("phi3", FUSED["phi3"]), factors=str(file))
    same(sparse(tiny_lora("phi3", FUSED["phi3"])), model, batch())
