"""What a user sees of a run: the progress bar, ``metrics.jsonl``, trackers, and the FLOPs behind the shares."""

from __future__ import annotations

import json
import logging
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..apply import SparseState
from ..config.train import TrainSection
from ..layouts import DecoderLayer, causal_lm, decoder_layers, layer_sizes, widths
from ..method.channels import HeadGeometry
from ..method.flops import TRIMMED, FlopModel, layer_shares
from ..method.masked_flops import MaskedMatrix, MaskedWork
from .trackers import Trackers

log = logging.getLogger(__name__)
_SELDOM = 10.0  # Seconds between updates of a bar that goes to a file.


def flop_model(model: Any, state: SparseState) -> FlopModel:
    """FLOP model of a PEFT model before it is sharded, with the kept shares that were applied to it."""
    config, layers = causal_lm(model).config.get_text_config(), decoder_layers(model)
    sizes = layer_sizes(layers, config)
    known = next((layer.attention.heads for layer in layers if layer.attention), None)
    last = layers[-1]
    trimmed = [last.linear(name) for name in TRIMMED if name in last.names]
    return FlopModel(
        hidden=config.hidden_size,
        width=next((size.width for size in sizes if size.width), 0),
        vocabulary=config.vocab_size,
        heads=known or HeadGeometry(heads=config.num_attention_heads, kv_heads=1, head_dim=2),
        lora_elements=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=layer_shares(len(layers), list(map(widths, layers)), state.sparsity),
        estimator_rank=state.config.rank,
        lora_elements_trimmed=sum(p.numel() for module in trimmed for p in module.parameters() if p.requires_grad),
        sizes=sizes,
        trims=bool(last.trims),
        masked=_masked(layers, state),
    )


def _masked(layers: list[DecoderLayer], state: SparseState) -> MaskedWork | None:
    if not state.masked or state.sparse_base is None:
        return None
    known = {id(layer.linear(name)): (layer.index, name) for layer in layers for name in layer.names}
    found = []
    for path, lora in state.masked.items():
        index, name = known.get(id(lora), (0, path))
        linear: Any = lora.get_base_layer()
        rank = max(a.out_features for a in lora.lora_A.values())
        found.append(
            MaskedMatrix(layer=index, name=name, rows=linear.out_features, columns=linear.in_features, rank=rank)
        )
    return MaskedWork(tuple(found), state.sparse_base.gradient)


class MetricsWriter:
    """Rank 0's record of a run. On the other ranks every call does nothing.

    Args:
        train: names the folder.
        total_steps: length of the bar.
        start_step: steps already done; rows after it, of a run that was cut off, are dropped.
        is_main: whether this rank writes.
        trackers: get the same rows.
    """

    def __init__(
        self, train: TrainSection, total_steps: int, start_step: int, is_main: bool, trackers: Trackers | None = None
    ) -> None:
        self.is_main, self._trackers, self._open = is_main, trackers or Trackers(), ExitStack()
        self.lacks_evaluation = False
        """Of a continued run: whether no evaluation of its first step is in the record. On rank 0."""
        if not is_main:
            return
        folder = Path(train.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if _step(line) <= start_step] if start_step else []
        self.lacks_evaluation = not any(_step(line) == start_step and "eval_loss" in line for line in kept)
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = self._open.enter_context(open(path, "a", encoding="utf-8"))  # noqa: SIM115
        seconds = 0.1 if sys.stderr.isatty() else _SELDOM
        bar = tqdm(
            None, "", total_steps, initial=start_step, disable=train.disable_tqdm, unit="step", mininterval=seconds
        )
        self._bar = self._open.enter_context(bar)
        self._open.enter_context(logging_redirect_tqdm())  # Messages go above the bar.

    def row(self, row: dict[str, float]) -> None:
        """One row per logged step (or evaluation): appended at once, so that a crash loses none."""
        if not self.is_main:
            return
        # JSON has no word for what is not finite.
        whole = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(whole, allow_nan=False) + "\n")
        self._file.flush()
        self._trackers.log(row)
        if "eval_loss" in row:
            log.info(
                "step %d: eval_loss %.4f, token accuracy %.1f%%, exact match %.1f%%",
                *(row["step"], row["eval_loss"], 100 * row["eval_mean_token_accuracy"], 100 * row["eval_exact_match"]),
            )

    def advance(self, loss: float, tokens_per_second: float, context_share: float) -> None:
        """Move the bar by one step."""
        if self.is_main:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s, {context_share:.0%} sparse", refresh=False
            )
            self._bar.update(1)

    def close(self) -> None:
        self._open.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step(line: str) -> float:
    """Step of a row; a row that a crash cut off belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
