"""Equalities 1 and 2: no sparsity is plain PEFT; sparse compute is dense compute with the dropped channels zeroed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from support.compare import loss_logits
from support.models import ALL_LINEAR, ATTENTION, FAMILIES, batch, tiny_lora
from support.oracle import assert_same, context_tokens, drop, train_step

SPARSITY = {"ffn": 0.8, "qk": 0.5, "vo": 0.6}
GROUPS = {"ffn": ["ffn"], "qk": ["qk"], "vo": ["vo"], "all": ["ffn", "qk", "vo"]}
families = pytest.mark.parametrize("family", FAMILIES)


def config(groups: list[str] | None = None, sparsity: float | None = None, layers: str = "0-2", **options: Any) -> Any:
    chosen = {g: {layers: SPARSITY[g] if sparsity is None else sparsity} for g in groups or GROUPS["all"]}
    return SparseLoRAConfig.from_dict({"layers": chosen, "rank": 4, **options})


def check_against_oracle(
    model: PeftModel, data: dict[str, Tensor], settings: Any, autocast: bool = False, **tolerance: float
) -> dict[int, dict[str, Tensor]]:
    plain = copy.deepcopy(model)
    apply_sparselora(model, settings)
    got = train_step(model, data, autocast)
    masks = selection(model)
    assert masks
    expected = train_step(drop(plain, masks, data, settings.lora_branch), data, autocast)
    assert_same(expected, got, data, **tolerance)
    return masks


# --- equality 1 ------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("kv_heads", [2, 6, 1], ids=["gqa", "mha", "mqa"])
def test_no_sparsity_equals_plain_peft(family: str, kv_heads: int) -> None:
    model = tiny_lora(family, ALL_LINEAR, num_key_value_heads=kv_heads)
    expected = train_step(model, batch())
    apply_sparselora(model, config(sparsity=0.0))
    assert_same(expected, train_step(model, batch()), batch())
    assert all(len(selection(model)[layer]["ffn"]) == 104 for layer in range(2))


def test_no_sparsity_keeps_the_loss_curve() -> None:
    curves = []
    for sparse in (False, True):
        model = tiny_lora(targets=ALL_LINEAR)
        if sparse:
            apply_sparselora(model, config(sparsity=0.0))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for step in range(5):
            losses.append(train_step(model, batch(seed=step % 2)).loss)
            optimizer.step()
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, rtol=1e-5, atol=0)
    assert curves[0][-1] < curves[0][1]


# --- equality 2 ------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("kv_heads", [2, 6, 1], ids=["gqa", "mha", "mqa"])
def test_equals_dense_with_dropped_channels_zeroed(family: str, kv_heads: int) -> None:
    model = tiny_lora(family, ALL_LINEAR, num_key_value_heads=kv_heads)
    masks = check_against_oracle(model, batch(), config())
    counts = {group: len(channels) for group, channels in masks[1].items()}
    assert counts == {"ffn": 21, "qk": 2 * kv_heads, "vo": -(-16 * kv_heads // 5)}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR], ids=["lora-attention", "lora-all"])
@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_each_group_alone_and_together(family: str, groups: str, targets: list[str], lora_branch: str) -> None:
    check_against_oracle(tiny_lora(family, targets), batch(), config(GROUPS[groups], lora_branch=lora_branch))


@pytest.mark.parametrize("target", ALL_LINEAR)
@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_lora_on_one_matrix_only(target: str, lora_branch: str) -> None:
    check_against_oracle(tiny_lora(targets=[target]), batch(), config(lora_branch=lora_branch))


@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_biases_everywhere(lora_branch: str) -> None:
    """On o and down too, where the bias belongs to the output and stays whole."""
    model = tiny_lora(targets=ALL_LINEAR, attention_bias=True, mlp_bias=True)
    check_against_oracle(model, batch(), config(lora_branch=lora_branch))


def test_fp64_leaves_no_room_for_small_errors() -> None:
    """Norms and rotary angles stay fp32 inside Transformers; both sides share them."""
    model = tiny_lora("qwen2", ALL_LINEAR, dtype=torch.float64)
    check_against_oracle(model, batch(), config(), rtol=1e-6, atol=1e-7)


def test_different_groups_in_different_layers() -> None:
    layers = {"ffn": {"0,2": 0.9}, "qk": {"1": 0.5}, "vo": {"1-2": 0.25}}
    masks = check_against_oracle(tiny_lora(targets=ALL_LINEAR), batch(), SparseLoRAConfig(layers=layers))
    assert {layer: sorted(chosen) for layer, chosen in masks.items()} == {0: ["ffn"], 1: ["qk", "vo"], 2: ["vo"]}


def test_the_estimator_changes_nothing_but_the_choice() -> None:
    """With the oracle given another mask, the comparison fails: it can tell."""
    model = tiny_lora()
    plain = copy.deepcopy(model)
    apply_sparselora(model, config(["vo"]))
    got = train_step(model, batch())
    masks = selection(model)
    masks[1]["vo"] = torch.tensor([c for c in range(16) if c not in masks[1]["vo"].tolist()])[:7]
    with pytest.raises(AssertionError):
        assert_same(train_step(drop(plain, masks, batch()), batch()), got, batch())


# --- batches ---------------------------------------------------------------------------------------------------------


def test_no_context_is_plain_peft() -> None:
    data = batch(padding=False)
    data["labels"] = data["input_ids"].clone()
    model = tiny_lora(targets=ALL_LINEAR)
    expected = train_step(model, data)
    apply_sparselora(model, config())
    assert_same(expected, train_step(model, data), data)
    assert selection(model)[0]["ffn"].tolist() == list(range(21))  # All scores are zero: the lowest indices.


def test_all_context_but_one_label() -> None:
    data = batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    data["labels"][0, -1] = 7
    # The last layer's products have one row here and 96 in the oracle: summed in another order.
    check_against_oracle(tiny_lora("qwen2", ALL_LINEAR), data, config(), atol=5e-6)


@families
def test_left_padding(family: str) -> None:
    data = {name: tensor.flip(1) for name, tensor in batch().items()}
    data["labels"] = data["labels"].flip(1)
    data["labels"][data["attention_mask"] == 0] = -100
    assert (data["attention_mask"][1] == 0)[0]
    check_against_oracle(tiny_lora(family, ALL_LINEAR), data, config())


def test_a_single_row_without_a_mask() -> None:
    data = batch(rows=1)
    mask = data.pop("attention_mask")
    model = tiny_lora(targets=ALL_LINEAR)
    plain = copy.deepcopy(model)
    apply_sparselora(model, config())
    got, whole = train_step(model, data), {**data, "attention_mask": mask}
    assert_same(train_step(drop(plain, selection(model), whole), whole), got, whole)


# --- adapters and dtypes ---------------------------------------------------------------------------------------------


def two_adapters() -> PeftModel:
    model = tiny_lora(targets=ALL_LINEAR)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj", "gate_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("active", [["other"], ["default"], ["default", "other"]], ids=str)
@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_two_adapters(active: list[str], lora_branch: str) -> None:
    model = two_adapters()
    model.base_model.set_adapter(active)
    check_against_oracle(model, batch(), config(lora_branch=lora_branch))


@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_disabled_adapters(lora_branch: str) -> None:
    model, data = tiny_lora(targets=ALL_LINEAR), batch()
    plain = copy.deepcopy(model)
    apply_sparselora(model, config(lora_branch=lora_branch))
    with model.disable_adapter():
        got = model(**data)
    drop(plain, selection(model), data, lora_branch)
    with plain.disable_adapter():
        expected = plain(**data)
    torch.testing.assert_close(got.loss, expected.loss)
    logits = [loss_logits(out.logits, data["labels"]) for out in (got, expected)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(**data).loss, got.loss, rtol=1e-3)


@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_adapters_with_a_bias_of_their_own(lora_branch: str) -> None:
    model = tiny_lora(targets=ALL_LINEAR, attention_bias=True, mlp_bias=True)
    model.add_adapter("biased", LoraConfig(r=4, target_modules=ALL_LINEAR, lora_bias=True))
    for name, p in model.named_parameters():
        if "lora_B.biased" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.set_adapter("biased")
    check_against_oracle(model, batch(), config(lora_branch=lora_branch))


# bf16 has 8 bits, and the two sides round at different places, in three layers, forward and backward.
BF16 = {"rtol": 5e-2, "atol": 6e-2}


@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
@families
def test_bf16_weights(family: str, lora_branch: str) -> None:
    model = tiny_lora(family, ALL_LINEAR, dtype=torch.bfloat16)
    check_against_oracle(model, batch(), config(lora_branch=lora_branch), **BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_autocast(lora_branch: str, dtype: torch.dtype) -> None:
    model = tiny_lora("qwen2", ALL_LINEAR, dtype=dtype)
    check_against_oracle(model, batch(), config(lora_branch=lora_branch), autocast=True, **BF16)


@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_dropout_runs_and_is_random(lora_branch: str) -> None:
    model = tiny_lora(targets=ALL_LINEAR, dropout=0.3)
    apply_sparselora(model, config(lora_branch=lora_branch))
    first, second = train_step(model, batch()), train_step(model, batch())
    assert first.loss.isfinite() and first.loss != second.loss
    torch.manual_seed(1)
    third = train_step(model, batch())
    torch.manual_seed(1)
    assert torch.equal(third.loss, train_step(model, batch()).loss)


# --- which channels --------------------------------------------------------------------------------------------------


def top(scores: Tensor, count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:count])


@families
@pytest.mark.parametrize("rank", [3, 64], ids=["rank 3", "full rank"])
def test_masks_follow_from_the_scores_by_definition(family: str, rank: int) -> None:
    """Scores in fp64 from the hidden states; at full rank those of the exact activations (equality 3)."""
    model, data = tiny_lora(family, ALL_LINEAR), batch()
    weights = {name: p.detach().double() for name, p in model.named_parameters() if "lora_" not in name}
    apply_sparselora(model, config(rank=rank))
    seen: dict[tuple[int, str], Tensor] = {}
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        for kind, norm in (("attention", layer.input_layernorm), ("ffn", layer.post_attention_layernorm)):
            norm.register_forward_hook(lambda m, a, y, site=(index, kind): seen.update({site: y.detach()}))
    train_step(model, data)
    context, _ = context_tokens(data)

    def estimate(index: int, name: str, kind: str) -> Tensor:
        (weight,) = (
            w for key, w in weights.items() if f"layers.{index}." in key and f"{name}.base_layer.weight" in key
        )
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        if rank >= len(s):
            return seen[index, kind][context].double() @ weight.t()
        return seen[index, kind][context].double() @ vt[:rank].t() * s[:rank] @ u[:, :rank].t()

    for index, chosen in selection(model).items():
        gate, up = (estimate(index, name, "ffn") for name in ("gate_proj", "up_proj"))
        ffn = (torch.nn.functional.silu(gate) * up).square().sum(0)
        q, k, v = (estimate(index, f"{name}_proj", "attention").square().sum(0) for name in "qkv")
        qk = torch.zeros(2 * 4)
        for h in range(2):
            for pair in range(4):
                k_sum = sum(k[h * 8 + d] for d in (pair, pair + 4))
                q_sum = sum(q[g * 8 + d] for g in range(6) if g // 3 == h for d in (pair, pair + 4))
                qk[h * 4 + pair] = q_sum * k_sum
        if index < 2:  # The last layer's FFN chooses none.
            assert chosen["ffn"].tolist() == top(ffn, 21)
        assert chosen["qk"].tolist() == top(qk, 4)
        assert chosen["vo"].tolist() == top(v, 7)
