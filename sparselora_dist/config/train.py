"""The ``train`` section: names and meanings of the Hugging Face Trainer's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .parse import check_fields, nearest, require, unknown_key

__all__ = ["SCHEDULERS", "TrainSection"]

# Those of transformers' schedules that need neither arguments of their own nor a metric.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
_TRACKERS = ("none", "tensorboard")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """How long, how fast, how much per step, and what is written down."""

    PATH: ClassVar[str] = "train"

    output_dir: str
    """Where metrics, checkpoints and the adapter go."""

    max_steps: int = -1
    """Optimizer steps; -1 leaves the length to ``num_train_epochs``."""

    num_train_epochs: float = 1.0
    """Passes over the training data, where ``max_steps`` is -1."""

    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""

    adam_beta1: float = 0.9
    """AdamW's decay of the gradient mean."""

    adam_beta2: float = 0.999
    """AdamW's decay of the squared gradient mean."""

    adam_epsilon: float = 1e-8
    """AdamW's denominator term."""

    per_device_train_batch_size: int = 1
    """Sequences per rank and micro-batch."""

    per_device_eval_batch_size: int | None = None
    """The same in evaluation; None is the training batch size."""

    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step; packed, as few as ``max_tokens_per_micro_batch`` allows for the same rows."""

    max_tokens_per_micro_batch: int | None = None
    """Tokens per rank and packed micro-batch; null is ``per_device_train_batch_size`` x ``data.max_length``."""

    lr_scheduler_type: str = "linear"
    """Shape of the learning rate after warm-up."""

    warmup_ratio: float = 0.0
    """Warm-up as a share of the run, in [0, 1]; not read where ``warmup_steps`` is set."""

    warmup_steps: int = 0
    """Warm-up in steps; where it is above 0 it goes before ``warmup_ratio``."""

    seed: int = 42
    """Of the adapter's start, the order of the data, and dropout."""

    logging_steps: int = 1
    """Steps between rows of metrics."""

    eval_steps: int | None = None
    """Steps between evaluations; None evaluates at the start and at the end only."""

    save_steps: int | None = None
    """Steps between checkpoints; None saves none on the way."""

    save_total_limit: int | None = None
    """Checkpoints that are kept; None keeps all."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    report_to: str | list[str] = "none"
    """Trackers beside ``metrics.jsonl``: "none", "tensorboard", or a list."""

    resume: bool | str = False
    """True continues from the newest checkpoint in ``output_dir``; a path continues from that one."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them."""

    gradient_checkpointing_kwargs: dict[str, bool] = field(default_factory=lambda: {"use_reentrant": False})
    """``use_reentrant``: which of PyTorch's two implementations."""

    use_liger_kernel: bool = False
    """On a GPU: RMS norm and RoPE by liger-kernel, an optional dependency. Its SwiGLU and losses are not used."""

    group_by_length: bool = True
    """Batches of similar length, so that little is padding."""

    disable_tqdm: bool = False
    """No progress bar."""

    ddp_timeout: int = 1800
    """Seconds that a collective waits for the other ranks before it is an error."""

    def __post_init__(self) -> None:
        for key in self.gradient_checkpointing_kwargs if isinstance(self.gradient_checkpointing_kwargs, dict) else ():
            if key != "use_reentrant":
                raise unknown_key(f"{self.PATH}.gradient_checkpointing_kwargs", key, ["use_reentrant"])
        check_fields(self, self.PATH)
        self._check(bool(self.output_dir), "output_dir", "the path of a folder")
        self._check(
            self.max_steps == -1 or self.max_steps >= 1,
            "max_steps",
            "integers from 1, or -1 (num_train_epochs decides)",
        )
        self._check(self.num_train_epochs > 0, "num_train_epochs", "numbers above 0")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed", "warmup_steps"):
            self._check(getattr(self, name) >= 0, name, "numbers from 0")
        for name in ("adam_beta1", "adam_beta2"):
            self._check(0 <= getattr(self, name) < 1, name, "numbers in [0, 1)")
        self._check(self.adam_epsilon > 0, "adam_epsilon", "numbers above 0")
        self._check(0 <= self.warmup_ratio <= 1, "warmup_ratio", "numbers in [0, 1]")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "ddp_timeout"):
            self._check(getattr(self, name) >= 1, name, "integers from 1")
        counts = ("per_device_eval_batch_size", "max_tokens_per_micro_batch", "eval_steps", "save_steps")
        for name in (*counts, "save_total_limit"):
            value = getattr(self, name)
            self._check(value is None or value >= 1, name, "integers from 1, or null")
        self._check_name("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        for tracker in self.report_to if isinstance(self.report_to, list) else [self.report_to]:
            self._check_name("report_to", tracker, _TRACKERS)
        self._check(self.resume != "", "resume", "true, false, or the path of a checkpoint")

    def _check(self, ok: bool, name: str, allowed: str) -> None:
        require(ok, f"{self.PATH}.{name}", getattr(self, name), allowed)

    def _check_name(self, name: str, value: str, known: tuple[str, ...]) -> None:
        near = nearest(value, known)
        hint = f"; did you mean '{near}'?" if near else ""
        require(value in known, f"{self.PATH}.{name}", value, ", ".join(known) + hint)

    @property
    def trackers(self) -> tuple[str, ...]:
        """``report_to`` as names, without "none"."""
        names: list[Any] = self.report_to if isinstance(self.report_to, list) else [self.report_to]
        return tuple(dict.fromkeys(name for name in names if name != "none"))
