"""Applying and removing: in place, for one instance, without a trace; and what is refused, by name."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection, set_step
from sparselora_dist.apply import find_state
from sparselora_dist.families import UnsupportedModelError
from sparselora_dist.io.factors import FactorMismatchError
from sparselora_dist.io.manifest import CorruptFileError, read_safetensors
from sparselora_dist.layers.hooks import BeginHook
from support.compare import assert_close
from support.models import ALL_LINEAR, ATTENTION, FAMILIES, batch, gradients, tiny_base, tiny_lora

LAYERS = {"ffn": {"0-2": 0.8}, "qk": {"1-2": 0.5}, "vo": {"1": 0.5}}
families = pytest.mark.parametrize("family", FAMILIES)


def config(**options: Any) -> SparseLoRAConfig:
    return SparseLoRAConfig.from_dict({"layers": LAYERS, **options})


def sparse_model(family: str = "llama", targets: list[str] | None = None, **options: Any) -> PeftModel:
    return apply_sparselora(tiny_lora(family, targets or ALL_LINEAR), config(**options))


def outputs(model: nn.Module, data: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step."""
    model.zero_grad()
    out = model(**(data or batch()))
    out.loss.backward()
    return out.logits.detach(), gradients(model)


def assert_identical(first: tuple, second: tuple) -> None:
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All that applying could leave behind: modules, attributes, parameters, hooks."""
    hooks = {}
    for name, module in model.named_modules():
        kinds = [kind for kind in vars(module) if "hook" in kind]
        hooks[name] = {kind: len(getattr(module, kind) or ()) for kind in kinds if kind != "_is_full_backward_hook"}
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "parameters": [(n, p.shape, p.dtype, p.requires_grad, p.is_contiguous()) for n, p in model.named_parameters()],
        "state": list(model.state_dict()),
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": hooks,
    }


# --- remove ----------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR], ids=["lora-attention", "lora-all"])
def test_remove_gives_back_the_model(family: str, targets: list[str]) -> None:
    model = tiny_lora(family, targets)
    before, parts = outputs(model), anatomy(model)
    apply_sparselora(model, config())
    assert not torch.equal(outputs(model)[0], before[0])
    assert anatomy(model)["modules"] != parts["modules"]
    assert remove_sparselora(model) is model
    assert_identical(before, outputs(model))
    assert anatomy(model) == parts
    assert find_state(model) is None


def test_remove_keeps_what_was_trained_and_the_mode() -> None:
    model = sparse_model()
    outputs(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.sub_(0.1 * p.grad)
    model.eval()
    expected = model(**batch()).logits
    remove_sparselora(model)
    assert not any(module.training for module in model.modules())
    assert torch.allclose(model(**batch()).logits, expected, rtol=1e-4, atol=1e-4)


def test_apply_again_after_remove() -> None:
    model = sparse_model()
    first = outputs(model)
    remove_sparselora(model)
    assert_identical(first, outputs(apply_sparselora(model, config())))


def test_remove_without_apply() -> None:
    for call in (remove_sparselora, selection, lambda model: set_step(model, 0, 1)):
        with pytest.raises(ValueError, match="call apply_sparselora"):
            call(tiny_lora())


# --- one instance ----------------------------------------------------------------------------------------------------


def test_only_this_instance_changes() -> None:
    model, other = tiny_lora(targets=ALL_LINEAR), tiny_lora(targets=ALL_LINEAR)
    expected, parts = outputs(other), anatomy(other)
    classes = {type(module) for module in model.modules()} | {nn.Module, nn.Linear}
    attributes = {cls: dict(vars(cls)) for cls in classes}
    apply_sparselora(model, config())
    outputs(model)
    assert_identical(expected, outputs(other))
    assert anatomy(other) == parts
    assert {cls: dict(vars(cls)) for cls in classes} == attributes


def test_a_deep_copy_is_independent() -> None:
    model = sparse_model()
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert_identical(expected, outputs(twin))
    outputs(twin, batch(seed=7))
    assert selection(twin)[0]["ffn"].tolist() != selection(model)[0]["ffn"].tolist()
    remove_sparselora(twin)
    assert_identical(expected, outputs(model))
    assert find_state(twin) is None and find_state(model) is not None


def test_a_causal_lm_without_adapters_is_accepted() -> None:
    model = tiny_base().requires_grad_(False).train()
    expected = model(**batch()).logits
    apply_sparselora(model, config(skip_unused_logits=False))
    assert not torch.equal(model(**batch()).logits, expected)
    assert sorted(selection(model)) == [0, 1, 2]
    remove_sparselora(model)
    assert torch.equal(model(**batch()).logits, expected)


# --- selection -------------------------------------------------------------------------------------------------------


def test_selection_is_sorted_indices_by_layer_and_group() -> None:
    model = sparse_model()
    assert selection(model) == {}
    outputs(model)
    chosen = selection(model)
    assert {layer: sorted(groups) for layer, groups in chosen.items()} == {
        0: ["ffn"],
        1: ["ffn", "qk", "vo"],
        2: ["qk"],  # The last layer's FFN runs at label positions only, whole.
    }
    for groups in chosen.values():
        for group, channels in groups.items():
            size, keep = {"ffn": (104, 21), "qk": (8, 4), "vo": (16, 8)}[group]
            assert channels.dtype == torch.int64 and len(channels) == keep
            assert channels.tolist() == sorted(set(channels.tolist()))
            assert int(channels[0]) >= 0 and int(channels[-1]) < size
    chosen[0]["ffn"].zero_()
    assert selection(model)[0]["ffn"].any(), "a caller can change the masks"


def test_selection_is_empty_for_dense_forwards() -> None:
    model = sparse_model()
    with torch.no_grad():
        model.eval()(**batch())
    assert selection(model) == {}
    outputs(model.train())
    data = batch()
    del data["labels"]
    model(**data)
    assert selection(model) == {}


def test_disabled_replaces_no_module() -> None:
    model = tiny_lora(targets=ALL_LINEAR)
    (logits, grads), modules = outputs(model), anatomy(model)["modules"]
    apply_sparselora(model, config(enabled=False, skip_unused_logits=False))
    assert anatomy(model)["modules"] == modules
    got = outputs(model)
    assert_close("logits", logits, got[0])
    for name, grad in grads.items():
        assert_close(name, grad, got[1][name], atol=2e-6 * grad.abs().max())
    assert selection(model) == {}
    remove_sparselora(model)


# --- when it is dense ------------------------------------------------------------------------------------------------


@families
def test_evaluation_and_generation_are_dense(family: str) -> None:
    plain, model = tiny_lora(family, ALL_LINEAR).eval(), sparse_model(family).eval()
    data = batch(padding=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, plain(**data).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**data).loss, plain(**data).loss)
    prompt = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    for mode in (False, True):
        made = [m.train(mode).generate(**prompt, max_new_tokens=6, do_sample=False) for m in (plain, model)]
        assert torch.equal(*made)
        assert made[0].shape[1] > data["input_ids"].shape[1]


def test_training_without_labels_is_dense() -> None:
    plain, model, data = tiny_lora(targets=ALL_LINEAR), sparse_model(), batch()
    del data["labels"]
    torch.testing.assert_close(model(**data).logits, plain(**data).logits, rtol=1e-4, atol=1e-4)


def test_shift_labels_make_the_same_split() -> None:
    data = batch()
    model = sparse_model(skip_unused_logits=False)
    expected = model(**data).logits
    labels = data.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    assert torch.equal(model(**data, labels=None, shift_labels=shifted).logits, expected)


@pytest.mark.parametrize("skip", [False, True])
def test_shift_labels_win_over_labels(skip: bool) -> None:
    """Sequence parallelism passes both, and the loss reads the shifted ones."""
    data, model = batch(), sparse_model(skip_unused_logits=skip)
    shifted = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    expected = sparse_model(skip_unused_logits=False)(**data)
    data["labels"] = torch.full_like(data["labels"], 7)  # Would make every position dense.
    got = model(**data, shift_labels=shifted)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)


def test_the_token_lists_are_where_the_model_computes() -> None:
    """Labels may be on the host: the loss moves them. No second device here, so the meta device stands for it."""
    model, data = sparse_model(), batch()
    context = find_state(model).context
    ids = data["input_ids"].to("meta")
    embeds = torch.empty(4, 24, 48, device="meta")
    for args, kwargs in (((), {"input_ids": ids}), ((ids,), {}), ((), {"inputs_embeds": embeds})):
        BeginHook(context)(model, args, {**kwargs, "labels": data["labels"]})
        lists = context.last.partition.context, context.last.partition.dense, context.last.loss.rows
        assert [rows.device.type for rows in lists] == ["meta"] * 3
        context.finish(model)


def test_a_training_forward_without_gradients_is_dense_and_not_counted() -> None:
    """As of a reference model; the channels of the last step stay to be seen."""
    plain, model = tiny_lora(targets=ALL_LINEAR), sparse_model()
    outputs(model)
    counts, chosen = find_state(model).context.counts, selection(model)
    before = counts.dense, counts.context
    with torch.no_grad():
        got, expected = model(**batch(seed=3)), plain(**batch(seed=3))
    assert_close("logits", expected.logits, got.logits)
    assert_close("loss", expected.loss, got.loss)
    assert (counts.dense, counts.context) == before
    assert torch.equal(selection(model)[0]["ffn"], chosen[0]["ffn"])


def test_an_exception_in_a_forward_leaves_no_open_micro_batch() -> None:
    model = sparse_model()
    expected = outputs(model)
    with pytest.raises(Exception):  # noqa: B017
        model(**{**batch(), "input_ids": torch.full((4, 24), 10_000)})
    assert not find_state(model).context.in_forward
    assert_identical(expected, outputs(model))


@pytest.mark.parametrize(
    ("start", "end", "sparse"),
    [(2, 4, {2, 3}), (0.25, None, {2, 3, 4, 5}), (0.0, 0.5, {0, 1, 2}), (0.0, None, {*range(6)})],
)
def test_schedule(start: float | int, end: float | int | None, sparse: set[int]) -> None:
    model = sparse_model(start_step=start, end_step=end)
    seen = set()
    for step in range(6):
        set_step(model, step, 6)
        outputs(model)
        if selection(model):
            seen.add(step)
    assert seen == sparse


def test_a_schedule_that_nothing_drives_warns_once() -> None:
    model = sparse_model(start_step=0.05)
    with pytest.warns(UserWarning, match=r"start_step=0.05.*nothing drives the schedule.*SparseLoRACallback"):
        outputs(model)
    assert selection(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outputs(model)
        outputs(sparse_model())


# --- refusals --------------------------------------------------------------------------------------------------------


def refuse(model: nn.Module, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """The error, and a model that is as it was."""
    parts = anatomy(model)
    with pytest.raises(error, match=match):
        apply_sparselora(model, config(**options))
    assert anatomy(model) == parts


def test_unknown_family() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    refuse(model, r"'gpt2'.*llama, mistral, qwen2, qwen3", UnsupportedModelError)


def test_partial_rotary() -> None:
    model = tiny_lora()
    model.get_base_model().config.rope_parameters["partial_rotary_factor"] = 0.5
    refuse(model, "partial_rotary_factor 0.5", UnsupportedModelError)


def change_layout(model: PeftModel, how: str) -> None:
    layer = model.get_base_model().model.layers[1]
    if how == "fused":
        layer.self_attn.qkv_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    elif how == "type":
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    elif how == "shape":
        layer.mlp.down_proj = nn.Linear(100, 48, bias=False)
    elif how == "norm":
        del layer.input_layernorm
    else:
        del layer.mlp


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("fused", "layers.1.self_attn.q_proj is missing"),
        ("type", "layers.1.mlp.up_proj is a Sequential, expected torch.nn.Linear"),
        ("shape", r"layers.1.mlp.down_proj is \(48, 100\), expected \(48, 104\)"),
        ("norm", "layers.1.input_layernorm is missing"),
        ("mlp", "layers.1.mlp is missing"),
    ],
)
def test_changed_layout(how: str, match: str) -> None:
    model = tiny_lora(targets=["v_proj"])
    change_layout(model, how)
    refuse(model, match, UnsupportedModelError)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_trainable_base(part: str) -> None:
    model = tiny_lora("qwen2")
    linear = model.get_base_model().model.layers[2].self_attn.k_proj.base_layer
    getattr(linear, part).requires_grad_()
    refuse(model, "layers.2.k_proj is trainable")


class Elsewhere(nn.Parameter):
    """Says that it is on a GPU."""

    device = torch.device("cuda:1")  # type: ignore[assignment]


def test_weights_on_several_devices() -> None:
    model = tiny_lora()
    norm = model.get_base_model().model.layers[2].input_layernorm
    norm.weight = Elsewhere(norm.weight.detach(), requires_grad=False)
    refuse(model, r"several devices \(cpu, cuda:1\).*device_map.*FSDP2 or ZeRO-3")
    norm.weight = nn.Parameter(norm.weight.detach().to("meta"), requires_grad=False)
    apply_sparselora(model, config(layers={"ffn": {"0": 0.5}}))


def test_a_replica_of_data_parallel() -> None:
    model = sparse_model()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"DataParallel is not supported.*torchrun or accelerate launch"):
        replica(**batch())
    assert not find_state(model).context.in_forward


def test_dora() -> None:
    model = get_peft_model(tiny_base(), LoraConfig(target_modules=["v_proj"], use_dora=True, task_type="CAUSAL_LM"))
    refuse(model, r"layers.1.v_proj uses a LoRA variant \(DoRA")


def test_twice() -> None:
    refuse(sparse_model(), "already called")
    refuse(sparse_model().get_base_model(), "already called")


@pytest.mark.parametrize("ranges", ["3", "1-5", "20-30"])
def test_a_range_that_the_model_does_not_have(ranges: str) -> None:
    refuse(tiny_lora(), rf"sparse_lora.layers.ffn.*{ranges}", layers={"ffn": {ranges: 0.5}})


# --- factor files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The factor file of the tiny Llama, rank 8."""
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "cache"))
    sparse_model()
    (file,) = (tmp_path / "cache" / "factors").iterdir()
    return file.rename(tmp_path / "factors.safetensors")


def test_a_factor_file_gives_the_model_of_the_cache(factors: Path) -> None:
    assert_identical(outputs(sparse_model()), outputs(sparse_model(factors=str(factors))))


def test_factors_of_another_model_rank_or_dtype(factors: Path) -> None:
    refuse(
        tiny_lora(seed=3), r"built from another model \('llama'\): layers.0", FactorMismatchError, factors=str(factors)
    )
    refuse(tiny_lora(), "factors of rank 8 .* needs rank 4", FactorMismatchError, factors=str(factors), rank=4)
    bf16 = tiny_lora(dtype=torch.bfloat16)
    refuse(bf16, "factors of dtype float32 .* needs dtype bfloat16", FactorMismatchError, factors=str(factors))
    more = {**LAYERS, "vo": {"0": 0.5}}
    refuse(
        tiny_lora(), "no factors of layers.0.self_attn.v_proj", FactorMismatchError, factors=str(factors), layers=more
    )


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "header only":
        file.write_bytes(data[:100])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "flipped bit":
        data[-100] ^= 1
        file.write_bytes(data)
    else:
        tensors, metadata = read_safetensors(file)
        first, second = "layers.0.mlp.gate_proj.a", "layers.1.mlp.gate_proj.a"
        if how == "swapped":
            tensors[first], tensors[second] = tensors[second], tensors[first]
        else:
            del tensors[first]
        save_file({name: t.clone() for name, t in tensors.items()}, file, metadata)


@pytest.mark.parametrize("how", ["truncated", "header only", "empty", "flipped bit", "swapped", "missing"])
def test_a_damaged_factor_file_is_refused_by_name(factors: Path, how: str) -> None:
    damage(factors, how)
    refuse(tiny_lora(), str(factors), CorruptFileError, factors=str(factors))


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.trace),))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    file, trace = tmp_path / "factors.safetensors", tmp_path / "payload-ran"
    torch.save({"a": Payload(trace)}, file)
    refuse(tiny_lora(), "not a safetensors file", CorruptFileError, factors=str(file))
    assert not trace.exists()


def test_a_missing_or_foreign_file(tmp_path: Path) -> None:
    refuse(tiny_lora(), "no such file", FileNotFoundError, factors=str(tmp_path / "nothing.safetensors"))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    refuse(tiny_lora(), "not a factor file", CorruptFileError, factors=str(tmp_path / "x.safetensors"))


# --- the adapter without this package --------------------------------------------------------------------------------


def saved_run(folder: Path, family: str) -> tuple[dict[str, Tensor], Tensor]:
    """Train two steps, save the base and the adapter; a batch and the logits of the dense model."""
    tiny_base(family).save_pretrained(folder / "base")
    model = sparse_model(family)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        outputs(model, batch(seed=seed))
        optimizer.step()
    model.save_pretrained(str(folder / "adapter"))
    data = {name: tensor for name, tensor in batch(seed=9).items() if name != "labels"}
    with torch.no_grad():
        return data, model.eval()(**data).logits


@families
def test_the_saved_adapter_in_plain_peft_is_the_dense_model(family: str, tmp_path: Path) -> None:
    """Equality 8."""
    data, expected = saved_run(tmp_path, family)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 3 * 7 * 2 and all("lora_" in name for name in saved)
    base = FAMILIES[family][1].from_pretrained(tmp_path / "base")
    base_logits = base(**data).logits
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    got = plain(**data).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, base_logits, rtol=1e-2, atol=1e-2)


WITHOUT_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sparselora_dist", "sparselora_kernels"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import sparselora_dist
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable")

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

data, expected = torch.load("expected.pt")
base = AutoModelForCausalLM.from_pretrained("base")
with torch.no_grad():
    got = PeftModel.from_pretrained(base, "adapter").eval()(**data).logits
torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
assert not any(name.startswith("sparselora") for name in sys.modules)
print("same logits")
"""


def test_the_saved_adapter_needs_no_part_of_this_package(tmp_path: Path) -> None:
    """Acceptance 8."""
    torch.save(saved_run(tmp_path, "qwen3"), tmp_path / "expected.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip().endswith("same logits"), result.stderr[-2000:]


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_sparse_layers_is_refused_and_works_after_removal(safe: bool) -> None:
    model, data = sparse_model(), batch()
    expected = model.eval()(**data).logits
    with pytest.raises(ValueError, match="call remove_sparselora"):
        copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    remove_sparselora(model)
    assert torch.allclose(model.merge_and_unload(safe_merge=safe)(**data).logits, expected, rtol=1e-3, atol=1e-3)


def test_training_forwards_without_labels_are_warned_about_once() -> None:
    model, data = sparse_model(), batch()
    del data["labels"]
    with pytest.warns(UserWarning, match="without labels and was computed densely"):
        model(**data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**data)
