"""How fast is a step of the authors' own SparseLoRA code, and of this package, with the same model and sparsity?

    git clone https://github.com/z-lab/sparselora          # the authors' code; nothing of it is part of this package
    python benchmarks/gpu_official.py --official sparselora --seconds 60

Llama-2-7B's shape, whose key and value heads are as many as its query heads, in bf16 under autocast, the adapter on q, k, v
and o, the math setting. Ours is timed first, since theirs replaces PEFT's forward in the whole process. Their modules are
used as they are; three things of older Transformers are put in their place: the attention class that they replace, its
attributes, and FlashAttention, for which both sides use PyTorch's SDPA. Their estimators have random values, as ours do.
One JSON row a line, as it comes.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

from gpu_models import SETTINGS, build, make_sparse
from gpu_profile import busy_seconds
from gpu_sides import Side, make_batch
from gpu_timing import free, no_collection, rounded, start_peak, timed
from shapes import llama

from sparselora_dist.layouts import decoder_layers

SHAPES = {
    "7b": llama(hidden=4096, width=11008, layers=32, heads=32, kv_heads=32, vocabulary=32000),
    "tiny": llama(hidden=64, width=192, layers=3, heads=4, kv_heads=4, vocabulary=128),
}
CONTEXT = 0.75


def official_model(model: Any, sparsity: dict[str, dict[int, float]], folder: str) -> Any:
    """The authors' modules in a PEFT model. ``sparsity``: by group (``ffn``, ``vo``) and layer."""
    sys.path.insert(0, folder)
    import peft
    import spft.modules.attn as attention
    import spft.modules.base as base
    from spft.modules import SPARSITY_MAPPING, SparseLinear, SparseLlamaMLP, lora_forward
    from spft.modules.pred import FFNPredictor, QKVOFusedPredictor

    peft.tuners.lora.layer.Linear.forward = lora_forward
    attention._flash_attention_forward = _sdpa
    device, dtype = next(model.parameters()).device, torch.bfloat16

    def ffn_estimator(mlp: Any, rank: int, *_: Any) -> nn.Module:
        return FFNPredictor(mlp.gate_proj.in_features, mlp.gate_proj.out_features, rank).to(device, dtype)

    def attention_estimator(module: Any, rank: int, *_: Any) -> nn.Module:
        hidden = module.q_proj.in_features
        return torch.compile(QKVOFusedPredictor(hidden, hidden, rank).to(device, dtype))  # As they do.

    base.create_mlp_svd_pred, base.create_attn_svd_pred = ffn_estimator, attention_estimator
    settings = SimpleNamespace(mode="svd_8", qk_per_head=False, sparse_lora_branch=False)

    class Attention(attention.SparseLlamaFlashAttention):
        """Called as Transformers calls an attention today."""

        def forward(self, hidden_states: Tensor, masks: Any = None, position_embeddings: Any = None, **_: Any) -> Any:
            return super().forward(hidden_states, position_embeddings=position_embeddings, masks=masks)[:2]

    config = model.get_base_model().config
    for layer in decoder_layers(model):
        number, module, mlp = layer.index, layer.module.self_attn, layer.module.mlp
        heads = {"num_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
        older = {"hidden_size": config.hidden_size, "rotary_emb": None, "_flash_attn_uses_top_left_mask": False}
        for name, value in (heads | older).items():
            setattr(module, name, value)
        for part, suffix in ((mlp, "mlp"), (module, "self_attn")):
            share = sparsity["ffn" if suffix == "mlp" else "vo"].get(number, 0)
            made: Any = SparseLlamaMLP if suffix == "mlp" else Attention
            new = made(part, name=f"layers.{number}.{suffix}", idx=number, sparsity=share, cfg=settings)
            for inner, linear in list(part.named_modules()):
                if isinstance(linear, nn.Linear):
                    mode = None if "lora_" in inner else SPARSITY_MAPPING.get(inner)
                    parent, _, leaf = inner.rpartition(".")
                    replaced = SparseLinear(base=linear, mode=mode, config=settings).train(linear.training)
                    setattr(new.get_submodule(parent) if parent else new, leaf, replaced)
            setattr(layer.module, suffix, new.train())
    return model


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class OfficialSide(Side):
    """Hands their modules the tokens of a batch as their model does: a slice, where prompts are equally long."""

    def gradients(self, batch: dict[str, Tensor]) -> Tensor:
        trained = batch["labels"] != -100
        first = int(trained.int().argmax(1).min())
        for module in self.model.modules():
            if hasattr(module, "token_splits"):
                module.forward = functools.partial(type(module).forward, module, masks=(trained, first))
        return super().gradients(batch)


def measure(side: Side, batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    for _ in range(2):
        free()
        side.step(batch)
    before = start_peak(device)
    with no_collection():
        times = [timed(lambda: side.step(batch), device) for _ in range(7 if device.type == "cuda" else 1)]
    peak = None if before is None else torch.cuda.max_memory_allocated() / 1e9
    return {
        "ms": rounded(statistics.median(times), 1e3),
        "busy_ms": rounded(busy_seconds(side, batch, device), 1e3),
        "gb": rounded(peak),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, metavar="FOLDER", help="with the authors' package spft")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--tokens", default="8192,2048")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter")
    given = parser.parse_args()
    device, name = (torch.device("cpu"), "tiny") if given.tiny else (torch.device("cuda"), "7b")
    if not given.tiny:
        from sparselora_dist.apply.liger import use_liger

        use_liger("llama")
    dtype, shape, setting = torch.bfloat16, SHAPES[name], SETTINGS["math"]
    end = time.monotonic() + given.seconds
    sparsity = {
        group: {int(layer): share for layers, share in found.items() for layer in layers.split(",")}
        for group, found in setting.layers(given.layers).items()
    }
    batches = {
        int(tokens): make_batch(
            shape.vocabulary * given.layers // shape.layers, int(tokens), given.length, CONTEXT, device
        )
        for tokens in given.tokens.split(",")
    }
    for kind in ("ours", "official"):
        model = build(shape, given.layers, "plain", device=device, dtype=dtype, length=given.length)
        if kind == "ours":
            side = Side(make_sparse(model, shape, setting, dtype) and model, device, dtype)
        else:
            side = OfficialSide(official_model(model, sparsity, given.official), device, dtype)
        for tokens, batch in batches.items():
            for checkpointing in (False, True):
                row = {"side": kind, "tokens": tokens, "checkpointing": checkpointing}
                if time.monotonic() > end:
                    print(json.dumps({**row, "why": "no time left"}), flush=True)
                    continue
                side.checkpointing(checkpointing)
                try:
                    row |= measure(side, batch, device)
                except Exception as problem:  # A row like the others.
                    row["why"] = repr(problem)[:300]
                print(json.dumps(row), flush=True)
        side.model = nn.Module()
        del model, side
        free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
