"""What a user sees of a run: the progress bar, ``metrics.jsonl``, TensorBoard, and the FLOPs behind the shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..apply import SparseState
from ..config.train import TrainSection
from ..families import causal_lm, decoder_layers, geometry
from ..method.flops import TRIMMED, FlopModel, layer_shares


def flop_model(model: Any, state: SparseState) -> FlopModel:
    """FLOP model of a PEFT model before it is sharded, with the kept shares that were applied to it."""
    config, heads = causal_lm(model).config, geometry(model)
    counts = heads.channel_counts(config.intermediate_size)
    last = decoder_layers(model)[-1].module.named_parameters()
    return FlopModel(
        hidden=config.hidden_size,
        width=config.intermediate_size,
        vocabulary=config.vocab_size,
        heads=heads,
        lora_elements=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=layer_shares(config.num_hidden_layers, counts, state.sparsity),
        estimator_rank=state.config.rank,
        lora_elements_trimmed=sum(p.numel() for n, p in last if p.requires_grad and set(n.split(".")) & set(TRIMMED)),
    )


class MetricsWriter:
    """Rank 0's record of a run. On the other ranks every call does nothing.

    Args:
        train: names the folder and the trackers.
        total_steps: length of the bar.
        start_step: steps already done; rows after it, of a run that was cut off, are dropped.
        is_main: whether this rank writes.
    """

    def __init__(self, train: TrainSection, total_steps: int, start_step: int, is_main: bool) -> None:
        self.is_main = is_main
        self._bar: Any = None
        self._board: Any = None
        if not is_main:
            return
        folder = Path(train.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if _step(line) <= start_step] if start_step else []
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if "tensorboard" in train.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(total=total_steps, initial=start_step, disable=train.disable_tqdm, unit="step", leave=True)

    def row(self, row: dict[str, float]) -> None:
        """One row per logged step (or evaluation): appended at once, so that a crash loses none."""
        if not self.is_main:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))

    def advance(self, loss: float, tokens_per_second: float, context_share: float) -> None:
        """Move the bar by one step."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s, {context_share:.0%} sparse", refresh=False
            )
            self._bar.update(1)

    def close(self) -> None:
        if self.is_main:
            self._bar.close()
            self._file.close()
            if self._board is not None:
                self._board.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step(line: str) -> float:
    """Step of a row; a row that a crash cut off belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
