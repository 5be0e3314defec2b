"""``sparselora-dist plan``: a table of layouts from the model's config alone, and the one to choose."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

from ..config import ConfigError, RunConfig
from ..plan.hardware import GPUS, Cluster, find_gpu
from ..plan.layouts import Layout, Plan, make_plan
from ..plan.shapes import ModelShape, find_shape
from ..plan.work import Batch, Work

WIDTH = 116
_COLUMNS = ("weights", "scales", "factors", "lora", "optimizer", "activations", "gather", "logits")
_HEADS = ("weights", "scales", "factor", "lora", "optim", "activ", "gather", "logits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sparselora-dist plan``."""
    parser.add_argument("--config", required=True, metavar="RUN.json", help="the run: adapter, sparsity, engine, batch")
    parser.add_argument(
        "--model", metavar="NAME_OR_CONFIG", help="a known name, a folder or a config.json; else the run's"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default 8)")
    parser.add_argument("--gpu", default="h100-80gb", metavar="KIND", help=", ".join(GPUS))
    parser.add_argument(
        "--intra-gbps", type=float, default=400.0, metavar="GB/s", help="a GPU, in a node (default 400)"
    )
    parser.add_argument("--inter-gbps", type=float, default=50.0, metavar="GB/s", help="a GPU, over nodes (default 50)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens per GPU and micro-batch; else batch x max_length"
    )
    parser.add_argument(
        "--context", type=float, default=0.75, metavar="SHARE", help="tokens without label (default 0.75)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 where the run's own layout does not fit (or nothing does), else 0.

    Raises:
        ConfigError: an argument, the run file or the model's config cannot be used.
    """
    config = RunConfig.from_file(arguments.config)
    if config.lora.init_from or (config.lora.loftq_rounds and Path(config.model.name_or_path).is_dir()):
        from ..io.start_adapter import completed  # PEFT, which a plan needs for nothing else.

        config = completed(config)
    name = arguments.model or config.model.name_or_path
    shape = find_shape(name)
    stored = None
    if (folder := Path(name)).exists():
        from ..io.prequantized import planned

        if found := planned(folder if folder.is_dir() else folder.parent, config.model, config.quantization):
            config, stored = replace(config, quantization=found[0]), found[1]
    cluster = Cluster(
        gpu=find_gpu(arguments.gpu),
        gpus=arguments.gpus,
        per_node=arguments.gpus_per_node,
        intra=arguments.intra_gbps * 1e9,
        inter=arguments.inter_gbps * 1e9,
    )
    batch = _batch(arguments, config)
    plan = make_plan(shape, config, cluster, batch, stored)
    if arguments.json:
        print(json.dumps(_as_json(plan), indent=1))
    else:
        _print(plan, shape, cluster, batch, config)
    if plan.refusal:
        print(f"error: {plan.refusal}", file=sys.stderr)
    return 1 if plan.refusal else 0


def _batch(arguments: argparse.Namespace, config: RunConfig) -> Batch:
    tokens = arguments.tokens
    if tokens is None:
        tokens = config.train.per_device_train_batch_size * config.data.max_length
    if tokens < 1:
        raise ConfigError(f"'--tokens' is {tokens}: allowed: integers from 1")
    if not 0 <= arguments.context <= 1:
        raise ConfigError(f"'--context' is {arguments.context:g}: allowed: a share in [0, 1]")
    return Batch(tokens=tokens, context=arguments.context, length=min(config.data.max_length, tokens))


def _as_json(plan: Plan) -> dict[str, object]:
    return {
        "layouts": [layout.to_dict() for layout in plan.layouts],
        "configured": plan.configured.name if plan.configured else None,
        "choice": plan.choice.name if plan.choice else None,
        "reason": plan.reason,
        "refusal": plan.refusal,
    }


def _print(plan: Plan, shape: ModelShape, cluster: Cluster, batch: Batch, config: RunConfig) -> None:
    gpu, steps = cluster.gpu, config.train.gradient_accumulation_steps
    work = plan.layouts[0].work
    saved = work.executed_flops / work.dense_flops
    print(
        f"{shape.family}, {shape.elements / 1e9:.2f}e9 parameters; {cluster.gpus} x {gpu.name} in {cluster.nodes} node(s), "
        f"{cluster.intra / 1e9:g} GB/s inside, {cluster.inter / 1e9:g} between"
    )
    print(
        f"{batch.tokens} tokens a GPU and micro-batch, {batch.context:.0%} of them context, {steps} micro-batch(es) a step\n"
        f"a GPU's step: {work.dense_flops / 1e12:.1f} TFLOP dense, {work.executed_flops / 1e12:.1f} executed ({saved:.0%})"
    )
    if config.sparse_base.enabled:
        print(_masks(work, config))
    print(f"GB a GPU, {gpu.usable / 1e9:.1f} usable; gathered GB and seconds a step; * the run's own layout\n")
    print(_storages(plan))
    heads = "".join(f"{head:>7}" for head in _HEADS)
    wide = max(17, *(len(layout.name) + 2 for layout in plan.layouts))
    print(f"{'':{wide}}{heads}{'total':>8} {'fits':<4}{'gathered':>9}{'comp s':>8}{'comm s':>8} bound")
    for layout in plan.layouts:
        print(_row(layout, layout is plan.configured, wide))
    print()
    print(textwrap.fill(plan.reason[0].upper() + plan.reason[1:] + ".", WIDTH))


def _masks(work: Work, config: RunConfig) -> str:
    """What a pruned base costs."""
    matrix = work.mask_elements * (2 if config.model.dtype == "bfloat16" else 4) / 1e9
    gradient = config.sparse_base.gradient
    instead = {
        "exact": "B·A of every matrix and the matrix' gradient, instead of products through the rank",
        "straight_through": "B·A of every matrix, instead of the forward's products through the rank",
    }
    text = (
        f"sparse_base ({gradient}): every adapted matrix counts as pruned; masks add {work.mask_flops / 1e12:+.1f} TFLOP to "
        f"what is executed ({instead[gradient]}). One transient matrix of {matrix:.2f} GB is in gather; with NF4 it is the "
        "decoded one. Zeros save neither bytes nor time."
    )
    return textwrap.fill(text, WIDTH)


def _storages(plan: Plan) -> str:
    """What the decoder's matrices take in each storage."""
    stored = {layout.storage: layout for layout in plan.layouts}
    words = [f"{name} {x.stored_bits:.4g} bits a weight, {x.matrix_bytes / 1e9:.1f} GB" for name, x in stored.items()]
    return f"the decoder's matrices in all: {'; '.join(words)}\n"


def _row(layout: Layout, own: bool, wide: int) -> str:
    sizes = "".join(f"{layout.bytes[kind] / 1e9:7.2f}" for kind in _COLUMNS)
    name = layout.name + ("*" if own else "")
    return (
        f"{name:<{wide}}{sizes}{layout.total / 1e9:8.2f} {'yes' if layout.fits else 'NO':<4}"
        f"{layout.traffic.gathered / 1e9:9.1f}"
        f"{layout.compute:8.2f}{layout.communication:8.2f} {'comm' if layout.bound == 'communication' else 'comp'}"
    )
