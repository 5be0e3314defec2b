"""Every causal model type of the installed Transformers: what is called supported is right, the rest is refused.

Of each type a tiny model with a LoRA on all the matrices that are known in it. Sparse: the loss and all gradients are those
of the dense model with the dropped channels at zero; without sparsity, those of plain PEFT; after removal it is as before.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection
from sparselora_dist.layouts import DecoderLayer, UnsupportedModelError, decoder_layers
from support.compare import assert_close
from support.every_type import GROUPS, Support, documented, model_types, rows, support, tiny_model
from support.mixtures import NarrowExperts
from support.oracle import Step, context_tokens, train_step


@cache
def found(model_type: str) -> Support:
    return support(model_type)


VERSION, LINES = documented()
SPARSE = [name for name, line in LINES.items() if set(line.split("|")[2:6]) != {"  "} and name in model_types()]


def check_documented(model_type: str) -> None:
    if transformers.__version__ == VERSION:
        assert found(model_type).row == LINES[model_type], "make models writes docs/models.md anew"


def lora(model_type: str) -> PeftModel:
    base = tiny_model(model_type)
    # By whole names: "w1" and "gate_proj" are other things too in some types.
    paths = [layer.path_of(name) for layer in decoder_layers(base) for name in layer.names]
    # Where experts alone are known, adapters before them, so that gradients go through them.
    paths = paths or [path for path, m in base.named_modules() if type(m) is nn.Linear and "attn." in path]
    assert paths
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=paths, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def config(model_type: str, sparsity: float) -> SparseLoRAConfig:
    groups = found(model_type).groups
    layers = {g: {",".join(map(str, indices)): sparsity} for g, indices in groups.items() if indices}
    return SparseLoRAConfig.from_dict({"layers": layers, "rank": 4})


class _Mask:
    """Hook that keeps some channels of context tokens, all of the others', and nothing of no token."""

    def __init__(self, kept: Tensor, context: Tensor) -> None:
        self.mask = torch.where(context.flatten()[:, None], kept, torch.ones_like(kept))

    def before(self, module: nn.Module, args: tuple) -> tuple:
        return (args[0] * self.mask.view(*args[0].shape[:-1], -1), *args[1:])

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * self.mask.view(*output.shape[:-1], -1)


def drop(model: PeftModel, masks: dict[int, dict[str, Tensor]], data: dict[str, Tensor]) -> PeftModel:
    """Leave out, densely, what a sparse model with ``masks`` leaves out."""
    context, _ = context_tokens(data)

    def kept(width: int, indices: Tensor) -> _Mask:
        channels = torch.zeros(width)
        channels[indices] = 1
        return _Mask(channels, context)

    layers = decoder_layers(model)
    for index, chosen in masks.items():
        layer: DecoderLayer = layers[index]
        heads: Any = layer.attention.heads if layer.attention else None
        if "ffn" in chosen:
            down = layer.linear("down_proj")
            down.register_forward_pre_hook(kept(layer.matrix("down_proj").in_features, chosen["ffn"]).before)
        if "experts" in chosen:
            experts: Any = layer.experts
            experts.module.forward = NarrowExperts(experts, chosen["experts"], context)
        outputs: dict[str, Tensor] = {}
        if "qk" in chosen:
            outputs |= {"q_proj": heads.q_rows(chosen["qk"]), "k_proj": heads.k_rows(chosen["qk"])}
        if "vo" in chosen:
            outputs["v_proj"] = heads.v_rows(chosen["vo"])
            o = layer.matrix("o_proj")
            o.register_forward_pre_hook(kept(o.in_features, heads.o_columns(chosen["vo"])).before)
        for name, owned in outputs.items():
            stored, rows = layer.within(name)
            linear = layer.matrix(stored)
            if rows is not None:  # Whatever else is in the matrix is whole.
                everything = torch.arange(linear.out_features)
                owned = torch.cat([everything[~torch.isin(everything, rows)], rows[owned]])
            linear.register_forward_hook(kept(linear.out_features, owned).after)
    return model


def assert_same(expected: Step, got: Step) -> None:
    assert_close("loss", expected.loss, got.loss, rtol=2e-5, atol=2e-6)
    # A matrix that the type does not use has no gradient on either side; one that only dense code touched, zeros.
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    assert largest > 0
    for name in expected.gradients.keys() | got.gradients.keys():
        a, b = (step.gradients.get(name) for step in (expected, got))
        zero = torch.zeros_like(a if a is not None else b)  # type: ignore[arg-type]
        a, b = (zero if g is None else g for g in (a, b))
        assert_close(name, a, b, rtol=1e-3, atol=2e-5 * max(float(a.abs().max()), 0.05 * largest))


@pytest.mark.parametrize("model_type", SPARSE)
def test_a_supported_type_is_right(model_type: str) -> None:
    check_documented(model_type)
    model, data = lora(model_type), rows()
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    before = train_step(copy.deepcopy(model), data)

    apply_sparselora(again, config(model_type, 0.0))
    assert_same(before, train_step(again, data))

    apply_sparselora(model, config(model_type, 0.6))
    got, masks = train_step(model, data), selection(model)
    groups = {group: list(indices) for group, indices in found(model_type).groups.items()}
    last = decoder_layers(plain)[-1]
    if last.trims and last.index in groups["ffn"]:
        groups["ffn"].remove(last.index)  # It runs where the loss reads it: at no context token.
    assert {g: [i for i in sorted(masks) if g in masks[i]] for g in GROUPS} == groups
    assert_same(train_step(drop(plain, masks, data), data), got)

    remove_sparselora(model)
    after = train_step(model, data)
    assert torch.equal(before.loss, after.loss)
    assert all(torch.equal(before.gradients[name], after.gradients[name]) for name in before.gradients)


@pytest.mark.parametrize("model_type", sorted(set(model_types()) - set(SPARSE)))
def test_any_other_type_is_refused_by_name(model_type: str) -> None:
    check_documented(model_type)
    try:
        model = tiny_model(model_type)
    except Exception:
        assert found(model_type).untried
        return
    with pytest.raises((UnsupportedModelError, ValueError)) as error:
        apply_sparselora(model.requires_grad_(False), SparseLoRAConfig.from_dict({"layers": {"ffn": {"0": 0.5}}}))
    assert type(model).__name__ in str(error.value) or repr(model.config.model_type) in str(error.value)
