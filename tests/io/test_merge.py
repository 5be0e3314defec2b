"""Merged models equal PEFT's, are written shard by shard, and appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparselora_dist.io import merge as module
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.channels import ATTENTION
from support.compare import assert_close
from support.every_type import tiny_model
from support.merging import BLOCKS, load, logits, make_adapter, save_base, tensors
from support.small_floats import SHAPE as SMALL_FLOATS
from support.small_floats import write_checkpoint

# One fp32 product of inner size 4 in two orders, added to a weight of order 0.1 to 1; then a few layers of it.
WEIGHTS, LOGITS = {"rtol": 1e-6, "atol": 1e-7}, {"rtol": 2e-5, "atol": 2e-5}
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# name: (base, adapter)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "sharded": ({"shard": "40KB"}, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ({}, {"use_rslora": True, "r": 6}),
    "patterns": (
        {},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "(gate|up)_proj": 5},
            "use_rslora": True,
        },
    ),
    "some layers": ({}, {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "v_proj"]}),
    "regular expression": ({}, {"target_modules": r".*layers\.1\..*(o|up)_proj"}),
    "modules_to_save": ({"shard": "40KB"}, {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "alpha as a fraction": ({}, {"lora_alpha": 2.5}),
    "lm_head": ({}, {"target_modules": ["lm_head", "q_proj"]}),
    "biases": ({"family": "qwen2"}, {"bias": "all"}),
    "lora_bias": ({"family": "qwen2"}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "qwen3": ({"family": "qwen3"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, tmp_path: Path) -> None:
    base_options, options = CASES[case]
    base = save_base(tmp_path / "base", **base_options)
    peft = make_adapter(tmp_path / "adapter", base, **options)
    unmerged = logits(peft)
    summary = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    reference, got = peft.merge_and_unload(), load(tmp_path / "out")
    expected = reference.state_dict()
    assert got.state_dict().keys() == expected.keys()
    for name, tensor in got.state_dict().items():
        assert_close(name, expected[name], tensor, **WEIGHTS)
    assert_close("logits", unmerged, logits(got), **LOGITS)
    assert summary.merged == sum(isinstance(m, torch.nn.Linear) for m in _adapted(tmp_path, base))
    assert (tmp_path / "out" / module.INDEX_FILE).exists() == ("shard" in base_options)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "starcoder2", "cohere2", "gpt_oss", "qwen3_moe", "mixtral"])
def test_any_family_equals_peft(family: str, tmp_path: Path) -> None:
    """Also tied heads, fused matrices, and experts whose files hold them one by one: those are copied as they are."""
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    layers = decoder_layers(load(base))
    # In a mixture on attention alone: for the FFN's names PEFT would adapt the experts' parameters.
    mixture = any(layer.experts for layer in layers)
    targets = [layer.path_of(name) for layer in layers for name in layer.names if not mixture or name in ATTENTION]
    peft = make_adapter(tmp_path / "adapter", base, target_modules=targets)
    unmerged = logits(peft)
    summary = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert summary.merged == len(targets) > 0
    assert_close("logits", unmerged, logits(load(tmp_path / "out")), **LOGITS)
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()


def test_4_bit_experts_and_adapters_on_them_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("qwen3_moe").save_pretrained(base)
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"--load-in-4bit of a mixture of experts"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out", load_in_4bit=True)
    make_adapter(tmp_path / "on experts", base, target_modules=["q_proj", "gate_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"'target_parameters' is .*: only plain LoRA can be merged"):
        merge_adapter(base, tmp_path / "on experts", tmp_path / "out")


def _adapted(tmp_path: Path, base: Path) -> list[torch.nn.Module]:
    from peft import PeftModel

    peft = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    return [m.base_layer for m in peft.modules() if hasattr(m, "lora_A") and len(m.lora_A)]


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    peft = make_adapter(tmp_path / "adapter", base)  # In fp32, of the same bf16 values.
    exact_logits = logits(peft)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    exact, got = peft.merge_and_unload().state_dict(), tensors(tmp_path / "out")
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        # Half a unit of 8 bits; fp32 sums in another order may tip a tie.
        assert_close(name, exact[name], tensor, rtol=2**-8, atol=1e-7)
    again = merge_adapter(base, tmp_path / "adapter", tmp_path / "again", dtype="float16")
    assert again.dtype == "float16" and tensors(tmp_path / "again")["lm_head.weight"].dtype == torch.float16
    # Rounded weights of 8 bits through three layers, against logits of order 1.
    assert_close("logits", exact_logits, logits(load(tmp_path / "out")), rtol=0.05, atol=0.15)


# --- an embedding that is the LM head too ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["lm_head", "q_proj"]}, False),
    ],
    ids=str,
)
def test_tied(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """What was trained apart is apart afterwards; the reference is the adapter's own output, not PEFT's merge, which
    adds an adapter of the LM head to the embedding as well."""
    base = save_base(tmp_path / "base", shard="40KB", tie_word_embeddings=True)
    peft = make_adapter(tmp_path / "adapter", base, **options)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in tensors(tmp_path / "out")) is not tied
    assert_close("logits", logits(peft), logits(load(tmp_path / "out")), **LOGITS)


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_folder(tmp_path: Path) -> None:
    """The same shards, an index of its own, the tokenizer, no other weights, readable for others."""
    base = save_base(tmp_path / "base", shard="40KB", dtype=torch.float32)
    for name in ("tokenizer.json", "special_tokens_map.json", "pytorch_model.bin", "modeling_x.py", "LICENSE.txt"):
        (base / name).write_text("{}")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32", "auto_map": {"x": "y.Z"}}))
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    out = tmp_path / "deep" / "out"
    summary = merge_adapter(base, tmp_path / "adapter", out)
    names = {path.name for path in base.iterdir()} - {"pytorch_model.bin", "modeling_x.py"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    ours, theirs = (json.loads((folder / module.INDEX_FILE).read_text()) for folder in (out, base))
    assert ours["weight_map"] == theirs["weight_map"]
    sizes = {name: t.numel() * t.element_size() for name, t in tensors(out).items()}
    assert ours["metadata"]["total_size"] == summary.size == sum(sizes.values())
    assert ours["metadata"]["total_size"] * 2 == theirs["metadata"]["total_size"]
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert file.stat().st_mode & stat.S_IRGRP
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and "auto_map" not in config
    assert summary.files == len(list(out.glob("*.safetensors"))) > 1
    assert "merged 3 matrices" in str(summary) and str(out) in str(summary)


def test_leftover_buffers_stay_as_they_are(tmp_path: Path) -> None:
    """Such as the rotary frequencies of old Llama checkpoints."""
    base = save_base(tmp_path / "base")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4), "steps": torch.tensor([7])}
    save_file(tensors(base) | extra, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    got = tensors(tmp_path / "out")
    assert all(torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype for name, tensor in extra.items())


@pytest.mark.parametrize("where", ["save_tensors", "copy_companions", "publish"])
def test_a_failure_leaves_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", shard="40KB")
    make_adapter(tmp_path / "adapter", base)
    plain, calls = getattr(module, where), []

    def fail_late(*args: Any) -> None:
        calls.append(args)
        if where == "save_tensors" and len(calls) < 2:
            return plain(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, where, fail_late)
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


# --- memory ----------------------------------------------------------------------------------------------------------


def test_one_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of an earlier shard is alive when the next is saved, and tensors come from their file one by one."""
    base = save_base(tmp_path / "base", shard="40KB")
    make_adapter(tmp_path / "adapter", base)
    sizes, alive, save = [], [], module.save_tensors

    def record(shard: dict[str, Tensor], path: Path) -> None:
        assert not any(reference() is not None for reference in alive)
        sizes.append(sum(t.numel() * t.element_size() for t in shard.values()))
        alive.extend(weakref.ref(t) for t in shard.values())
        save(shard, path)

    monkeypatch.setattr(module, "save_tensors", record)
    summary = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert len(sizes) > 4 and sum(sizes) == summary.size
    assert max(sizes) <= 40_000


# Not ru_maxrss, which a child inherits from the process that started it.
PEAK = """
import sys
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.channels import ATTENTION
base, small, adapter, out = sys.argv[1:]
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
merge_adapter(small, adapter + "-small", out + "-small")  # What is imported, is imported here.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # Forget the peak so far.
before = status("VmRSS")
merge_adapter(base, adapter, out)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to read the peak from")
def test_peak_memory(tmp_path: Path) -> None:
    """A base of 5 shards of 30 MB, 5 layers each; the process grows by less than 1.75 of them: the shard that is made, the
    tensor that is read, its fp32, and what libraries take at their first large product (10 to 20 MB)."""
    small = save_base(tmp_path / "small")
    make_adapter(tmp_path / "adapter-small", small)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 25, "num_attention_heads": 64}
    base = save_base(tmp_path / "base", shard="32MB", dtype=torch.bfloat16, **shape)
    make_adapter(tmp_path / "adapter", base, load(base, torch.bfloat16))
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert len(shards) == 5
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("base", "small", "adapter", "out"))]
    # Freed memory goes back to the system at once, instead of as the allocator likes.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    grown = int(result.stdout.split()[-1]) / max(shards)
    assert 0.9 < grown < 1.75, f"{grown:.2f} shards"


# --- 4-bit -----------------------------------------------------------------------------------------------------------


def bnb_roundtrip(matrix: Tensor, double_quant: bool = True) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(matrix.contiguous(), compress_statistics=double_quant, quant_type="nf4")
    return dequantize_4bit(codes, state)


def stored(name: str, weight: Tensor, double_quant: bool = True) -> Tensor:
    """What training with 4-bit weights saw."""
    kind = name.split(".")[-2]
    if kind not in DECODER:
        return weight
    if kind in ("o_proj", "down_proj"):
        return bnb_roundtrip(weight.t(), double_quant).t()
    return bnb_roundtrip(weight, double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_trained_in_4bit(double_quant: bool, tmp_path: Path) -> None:
    """Every decoder matrix is its 4-bit self, with or without an adapter on it."""
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", shard="40KB", dtype=torch.bfloat16, **BLOCKS)
    model = load(base)
    for name, p in model.named_parameters():
        p.data = stored(name, p.data.bfloat16(), double_quant).float()
    peft = make_adapter(tmp_path / "adapter", base, model, target_modules=["q_proj", "o_proj"])
    unmerged = logits(peft)
    options: dict[str, Any] = {"load_in_4bit": True, "double_quant": double_quant}
    summary = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", **options)
    assert (summary.dequantized, summary.merged) == (21, 6)
    expected, got = peft.merge_and_unload().state_dict(), tensors(tmp_path / "out")
    for name, tensor in got.items():
        adapted = any(part in name for part in ("q_proj", "o_proj"))
        assert_close(name, expected[name], tensor, rtol=2**-8 if adapted else 0.0, atol=1e-7 if adapted else 0.0)
    assert_close("logits", unmerged, logits(load(tmp_path / "out")), rtol=0.05, atol=0.15)

    merge_adapter(base, tmp_path / "adapter", tmp_path / "fp32", dtype="float32", **options)
    # In fp32 the dequantised values are not rounded to 8 bits.
    fp32 = tensors(tmp_path / "fp32")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(fp32[name], stored(name, tensors(base)[name].float(), double_quant))


def test_prequantized(tmp_path: Path) -> None:
    """A base that bitsandbytes has quantised: its own values; with --load-in-4bit, o and down as training stores them."""
    pytest.importorskip("bitsandbytes")
    base = prequantize(tmp_path)
    assert any(name.endswith("quant_state.bitsandbytes__nf4") for name in tensors(base))
    plain = load(tmp_path / "base")
    for name, p in plain.named_parameters():
        if name.split(".")[-2] in DECODER:
            p.data = bnb_roundtrip(p.data.bfloat16()).float()
    peft = make_adapter(tmp_path / "adapter", tmp_path / "base", plain, target_modules=["v_proj", "down_proj"])
    unmerged = logits(peft)
    summary = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert (summary.dequantized, summary.merged) == (21, 6)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    weight_map = json.loads((tmp_path / "out" / module.INDEX_FILE).read_text())["weight_map"]
    got = tensors(tmp_path / "out")
    assert weight_map.keys() == got.keys() == load(tmp_path / "base").state_dict().keys()
    expected = peft.merge_and_unload().state_dict()
    for name, tensor in got.items():
        assert_close(name, expected[name], tensor, rtol=2**-8, atol=1e-7)
    assert_close("logits", unmerged, logits(load(tmp_path / "out")), rtol=0.05, atol=0.15)

    merge_adapter(base, tmp_path / "adapter", tmp_path / "ours", load_in_4bit=True)
    ours = tensors(tmp_path / "ours")
    for layer in range(3):
        q, o = (f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in "qo")
        assert torch.equal(ours[q], got[q])
        twice = bnb_roundtrip(expected[o].bfloat16().t()).t()
        assert torch.equal(ours[o], twice) and not torch.equal(twice, got[o])


def test_what_a_quantised_base_left_plain_stays_so(tmp_path: Path) -> None:
    """As in training: a module that bitsandbytes skipped is not quantised by --load-in-4bit either."""
    pytest.importorskip("bitsandbytes")
    base = prequantize(tmp_path, llm_int8_skip_modules=["q_proj", "lm_head"])
    make_adapter(tmp_path / "adapter", tmp_path / "base", load(tmp_path / "base"), target_modules=["v_proj"])
    summary = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", load_in_4bit=True)
    assert summary.dequantized == 18
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(tensors(tmp_path / "out")[name], tensors(base)[name].bfloat16())


def prequantize(tmp_path: Path, shard: str = "40KB", **options: Any) -> Path:
    """``tmp_path/base`` and, in ``tmp_path/nf4``, the same as Transformers saves it in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = save_base(tmp_path / "base", dtype=torch.bfloat16, **BLOCKS)
    section = BitsAndBytesConfig(
        load_in_4bit=True, **options, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=section)
    model.save_pretrained(tmp_path / "nf4", max_shard_size=shard)
    return tmp_path / "nf4"


def test_what_is_not_a_4bit_weight_is_named(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = prequantize(tmp_path, shard="1GB")
    make_adapter(tmp_path / "adapter", tmp_path / "base")
    name, file = "model.layers.0.mlp.up_proj.weight", base / "model.safetensors"
    whole = tensors(base)
    for change, message in (
        ({name: whole[name][:-1].clone()}, rf"{file.name}: '{name}' is U8 \(4095, 1\), expected U8 codes of a"),
        ({f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}, "does not describe a 4-bit"),
        ({f"{name}.nested_absmax": None}, f"no '{name}.nested_absmax'"),
        ({name: None}, f"but no '{name}'"),
    ):
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, file)
        with pytest.raises(ValueError, match=message):
            merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    save_file(whole, file)
    config = json.loads((base / "config.json").read_text())
    for section, found in (
        ({"quant_method": "gptq"}, "'gptq'"),
        (config["quantization_config"] | {"bnb_4bit_quant_type": "fp4"}, "'bitsandbytes fp4'"),
        (config["quantization_config"] | {"load_in_4bit": False}, "'bitsandbytes'"),
    ):
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
        with pytest.raises(ValueError, match=rf"'quantization_config' is {found}"):
            merge_adapter(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("kind", ["fp8 block", "nvfp4", "modelopt nvfp4"])
def test_a_base_in_small_floats_is_merged_in_its_own_values(tmp_path: Path, kind: str) -> None:
    """The result is plain: nothing is left of codes, scales, settings or scales of activations."""
    means = write_checkpoint(tmp_path / "base", kind, left=("layers.0.mlp.down_proj",))
    plain = save_base(tmp_path / "plain", **SMALL_FLOATS)
    save_file(tensors(plain) | means, plain / "model.safetensors", {"format": "pt"})
    make_adapter(tmp_path / "adapter", plain, target_modules=["v_proj", "down_proj"])
    summary = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert (summary.dequantized, summary.merged, summary.quantized) == (13, 4, 0)
    merge_adapter(plain, tmp_path / "adapter", tmp_path / "expected", dtype="float32")
    expected, got = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"is quantised already, .* leave --load-in-4bit out"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "four", load_in_4bit=True)
