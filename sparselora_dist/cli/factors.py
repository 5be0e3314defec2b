"""``sparselora-dist factors``: estimator factors that know the data, as a file for ``sparse_lora.factors``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ..apply.experts import whole_experts
from ..config import ConfigError, RunConfig
from ..config.engine import EngineSection
from ..config.sparse import GROUPS
from ..data import collate, load_dataset_tokens, padding_id
from ..engines import make_engine
from ..io.adapter import is_adapted
from ..io.factors import write_factors
from ..io.load import check_model, load_base, load_tokenizer
from ..io.start_adapter import completed
from ..layouts import decoder_layers
from ..method.estimator import low_rank_factors
from ..train.moments import second_moments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sparselora-dist factors``."""
    parser.add_argument("--config", required=True, metavar="RUN.json", help="the run: model, data, rank")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .safetensors file to write")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="training rows to look at (default 64)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows at a time (default 8)")


def run(arguments: argparse.Namespace) -> int:
    """Write the file; 0.

    In one process, whatever engine the run names: the base model must fit on its device.

    Raises:
        ConfigError: an argument or the run file cannot be used.
    """
    for name in ("rows", "batch"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    config = replace(completed(RunConfig.from_file(arguments.config)), engine=EngineSection(name="single"))
    disable_progress_bar()
    check_model(config.model)
    tokenizer = load_tokenizer(config.model)
    data = load_dataset_tokens(config.data.train, tokenizer, config.data.max_length, "train", arguments.rows)
    engine = make_engine(config)
    base = load_base(
        config.model, config.quantization, engine.placement(), whole=partial(is_adapted, config.lora.build())
    )
    whole_experts(base.model)
    model = base.model.to(engine.device)
    pad = padding_id(tokenizer)
    starts = range(0, len(data), arguments.batch)
    rows = (range(start, min(start + arguments.batch, len(data))) for start in starts)
    batches = (collate(data, list(some), pad) for some in rows)
    moments = second_moments(model, ({n: t.to(engine.device) for n, t in batch.items()} for batch in batches))
    rank = config.sparse_lora.rank
    layers = decoder_layers(model)
    names = [(x.index, n) for x in layers for g in GROUPS if g not in x.missing for n in x.scored(g)]
    matrices = [matrix for matrix in names if matrix in moments]
    factors = {
        matrix: low_rank_factors(base.weights.get(*matrix), rank, second_moment=moments[matrix]) for matrix in matrices
    }
    marks = {matrix: base.weights.mark(*matrix) for matrix in matrices}
    output = Path(arguments.output)
    write_factors(output, factors, marks, rank=rank, model_id=config.model.name_or_path)
    engine.close()
    print(
        f"{output}: rank {rank} factors of {len(matrices)} matrices, weighted by {len(data)} rows, for sparse_lora.factors"
    )
    return 0
