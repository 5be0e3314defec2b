"""What is inspected: a run's folder, or a model with a run file; its data; and the measurement from both."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from ..apply import estimator_factors
from ..apply.experts import whole_experts
from ..apply.loftq import loftq_start
from ..apply.masking import find_pruned, mask
from ..config.errors import ConfigError
from ..config.run import RunConfig
from ..config.sparse import GROUPS
from ..data import TokenDataset, collate, load_dataset_tokens, padding_id
from ..io.adapter import ADAPTER_FILE, is_adapted, load_adapter
from ..io.load import check_model, load_base, load_tokenizer
from ..io.start_adapter import completed
from ..layouts import decoder_layers
from ..sharding.placement import Placement
from .fidelity import group_means
from .observe import Observer, observe

FORMAT = "sparselora-fidelity/1"
DEFAULT_RANKS = (8, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Whose estimator is looked at."""

    config: RunConfig
    run: Path | None
    """The run's folder, if it is a run."""
    adapter: Path | None
    """The folder of its adapter, if it has one."""


def find_subject(target: str, config: str | None) -> Subject:
    """A run's folder (it holds ``run.json``), or a model with the run file ``config``.

    Raises:
        ConfigError: neither.
    """
    folder = Path(target)
    run = folder if (folder / "run.json").is_file() else None
    if run is None and config is None:
        what = "a folder without run.json" if folder.is_dir() else "no folder"
        raise ConfigError(
            f"'{target}' is not a run ({what}): give the output_dir of a run, or a model together with --config RUN.json, "
            "which says what is sparse and on which data"
        )
    # What a run has written down says all; the adapter that it started from may be gone.
    settings = RunConfig.from_file(config or folder / "run.json")
    if run is None:
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, name_or_path=target))
    if config:
        settings = completed(settings)
    adapter = run / "adapter" if run else None
    return Subject(
        config=settings, run=run, adapter=adapter if adapter and (adapter / ADAPTER_FILE).is_file() else None
    )


def check_ranks(ranks: Sequence[int] | None, own: int) -> list[int]:
    """The ranks to compare, ascending, the run's own among them.

    Raises:
        ConfigError: one below 1.
    """
    for rank in ranks or ():
        if rank < 1:
            raise ConfigError(f"'--ranks' holds {rank}: allowed: integers from 1, such as 8,32")
    return sorted({*(DEFAULT_RANKS if ranks is None else ranks), own})


def measure(
    subject: Subject, *, data: str | None = None, rows: int = 64, ranks: Sequence[int] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Load the model and the first ``rows`` of the data, run them densely, and say how the estimator would have chosen.

    Args:
        subject: see :func:`find_subject`.
        data: as ``data.train``; by default the run's evaluation data, or its training data where it has none.
        rows: how many, in the order of the data.
        ranks: of the estimators; by default 8 and 32. The run's own is always added.
        seed: of the random choice.

    Returns:
        Plain data: ``sites`` (a layer's group each), ``groups`` (their means) and what was measured.

    Raises:
        ConfigError: nothing is sparse, a rank or a number of rows that is none, data without context tokens.
    """
    config = subject.config
    own = config.sparse_lora.rank
    compared = check_ranks(ranks, own)
    if rows < 1:
        raise ConfigError(f"'--rows' is {rows}: allowed: integers from 1")
    base_config = check_model(config.model)
    sparsity = config.sparse_lora.sparsity(base_config.num_hidden_layers)
    sparsity = {group: by_layer for group, by_layer in sparsity.items() if by_layer}
    if not sparsity:
        raise ConfigError(
            "'sparse_lora.layers' is empty: there is no sparse layer to inspect. Name some, such as "
            '{"ffn": {"3-30": 0.99}}, in the file of --config'
        )
    source, key = (data, "--data") if data else (config.data.eval or config.data.train, "data.eval")
    if key == "data.eval" and config.data.eval is None:
        key = "data.train"
    tokenizer = load_tokenizer(config.model)
    dataset = load_dataset_tokens(source, tokenizer, config.data.max_length, "validation", rows, key=key)
    batches = _batches(dataset, config.train.per_device_train_batch_size, padding_id(tokenizer))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora = config.lora.build()
    whole = partial(is_adapted, lora) if subject.adapter else lambda name: False
    placement = Placement(device)
    loftq = loftq_start(config, placement, subject.adapter) if subject.adapter else None
    shift = loftq.shift if loftq else None
    base = load_base(config.model, config.quantization, placement, whole=whole, shift=shift)
    model, layers = base.model, decoder_layers(base.model)
    able = {group: [layer.index for layer in layers if group not in layer.missing] for group in GROUPS}
    sparsity = {g: by for g, by in config.sparse_lora.sparsity(len(layers), able).items() if by}
    whole_experts(model)
    factors = _factors(model, sparsity, config, base.weights, compared)
    if subject.adapter:
        model = get_peft_model(model, lora).to(device)
        load_adapter(model, subject.adapter)
        if config.sparse_base.enabled:
            mask(find_pruned(model, config.sparse_lora, config.sparse_base), config.sparse_base)
    observer = Observer(model, sparsity, factors, ranks=compared, own_rank=own, seed=seed)
    seen = observe(model, observer, batches, device, partial(_autocast, config.model.dtype, device))
    if not seen.batches:
        raise ConfigError(
            f"'{key}': {source} has no context tokens in its first {len(dataset)} row(s): every token is trained on, so "
            "that nothing would be computed sparsely. Use data with prompts"
        )
    return {
        "format": FORMAT,
        "model": config.model.name_or_path,
        "adapter": str(subject.adapter) if subject.adapter else None,
        "data": str(source),
        "rows": len(dataset),
        "batches": seen.batches,
        "rows_per_batch": _batch_size(dataset, config.train.per_device_train_batch_size),
        "tokens": seen.tokens,
        "context_tokens": seen.context_tokens,
        "own_rank": own,
        "ranks": compared,
        "layers": base_config.num_hidden_layers,
        "groups": group_means(seen.sites),
        "sites": [site.to_dict() for site in seen.sites],
    }


def _factors(
    model: Any, sparsity: dict[str, dict[int, float]], config: RunConfig, weights: Any, ranks: Sequence[int]
) -> dict[Any, tuple[Tensor, Tensor]]:
    """Of the largest rank: its leading part is the factors of a smaller one."""
    sparse = config.sparse_lora
    if max(ranks) != sparse.rank:
        sparse = dataclasses.replace(sparse, rank=max(ranks), factors=None)
    return estimator_factors(model, sparsity, sparse, weights)


def _autocast(dtype: str, device: torch.device) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, torch.bfloat16)


def _batch_size(dataset: TokenDataset, configured: int) -> int:
    """As in training, but at least two rows, so that a batch has two halves."""
    return min(max(configured, 2), len(dataset))


def _batches(dataset: TokenDataset, configured: int, padding: int) -> Iterator[dict[str, Tensor]]:
    """Whole batches in the data's order."""
    size = _batch_size(dataset, configured)
    for start in range(0, len(dataset) - size + 1, size):
        yield collate(dataset, range(start, start + size), padding)


def to_json(fidelity: dict[str, Any]) -> str:
    """What is written to ``fidelity.json`` and printed."""
    return json.dumps(fidelity, indent=1)
