"""The ``train`` section: names and meanings of the Hugging Face Trainer's arguments."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from .limits import ALLOWED, AboveZero, BelowOne, FromZero, NonNegative, Path, Positive, Says, Share
from .model import CONFIG, Section, section

# fmt: off
# Those of transformers' schedules that need neither arguments of their own nor a metric.
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
# Accelerate's trackers, and the Trainer's two words.
Tracker = Literal[
    "none", "all", "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "swanlab", "dvclive", "aim"
]
# fmt: on


@with_config(CONFIG)
class CheckpointingKwargs(TypedDict, total=False):
    """Arguments of PyTorch's checkpoint function."""

    use_reentrant: bool
    """Which of PyTorch's two implementations."""


@section
class TrainSection(Section):
    """How long, how fast, how much per step, and what is written down."""

    PATH: ClassVar[str] = "train"

    output_dir: Annotated[Path, Says("the path of a folder")]
    """Where metrics, checkpoints and the adapter go."""

    max_steps: Positive | Literal[-1] = -1
    """Optimizer steps; -1 leaves the length to ``num_train_epochs``."""

    num_train_epochs: AboveZero = 1.0
    """Passes over the training data, where ``max_steps`` is -1."""

    learning_rate: FromZero = 2e-4
    """Peak learning rate of AdamW."""

    weight_decay: FromZero = 0.0
    """Decoupled weight decay of AdamW."""

    adam_beta1: BelowOne = 0.9
    """AdamW's decay of the gradient mean."""

    adam_beta2: BelowOne = 0.999
    """AdamW's decay of the squared gradient mean."""

    adam_epsilon: AboveZero = 1e-8
    """AdamW's denominator term."""

    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] | None = None
    """The implementation of AdamW, in the Trainer's names: PyTorch's (``fused`` is one kernel), or bitsandbytes' with
    moments in 8 bits (``paged`` lets them go to the host's memory); null is fused on a GPU and plain elsewhere."""

    per_device_train_batch_size: Positive = 1
    """Sequences per rank and micro-batch."""

    per_device_eval_batch_size: Positive | None = None
    """The same in evaluation; None is the training batch size."""

    gradient_accumulation_steps: Positive = 1
    """Micro-batches per optimizer step; packed, as few as ``max_tokens_per_micro_batch`` allows for the same rows."""

    max_tokens_per_micro_batch: Positive | None = None
    """Tokens per rank and packed micro-batch; null is ``per_device_train_batch_size`` x ``data.max_length``."""

    lr_scheduler_type: Annotated[Scheduler, ALLOWED] = "linear"
    """Shape of the learning rate after warm-up."""

    warmup_ratio: Share = 0.0
    """Warm-up as a share of the run, in [0, 1]; not read where ``warmup_steps`` is set."""

    warmup_steps: NonNegative = 0
    """Warm-up in steps; where it is above 0 it goes before ``warmup_ratio``."""

    seed: NonNegative = 42
    """Of the adapter's start, the order of the data, and dropout."""

    logging_steps: Positive = 1
    """Steps between rows of metrics."""

    eval_steps: Positive | None = None
    """Steps between evaluations; None evaluates at the start and at the end only."""

    save_steps: Positive | None = None
    """Steps between checkpoints; None saves none on the way."""

    save_in_background: bool = True
    """Train on while a checkpoint is written; false waits for it."""

    save_total_limit: Positive | None = None
    """Checkpoints that are kept; None keeps all."""

    max_grad_norm: FromZero = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    report_to: Annotated[Tracker | list[Tracker], ALLOWED] = "none"
    """Trackers beside ``metrics.jsonl``: a name or a list; "all" is every one that is installed."""

    run_name: str | None = None
    """What the trackers call the run; null leaves it to them."""

    logging_dir: Path | None = None
    """Where TensorBoard and Aim write; null is inside ``output_dir``."""

    resume: Annotated[bool | Path, Says("true, false, or the path of a checkpoint")] = False
    """True continues from the newest checkpoint in ``output_dir``; "auto" does where there is one, and begins where there
    never was; a path continues from that one."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them."""

    gradient_checkpointing_kwargs: CheckpointingKwargs = field(
        default_factory=lambda: CheckpointingKwargs(use_reentrant=False)
    )
    """Arguments of PyTorch's checkpoint function."""

    use_liger_kernel: bool = False
    """On a GPU: RMS norm and RoPE by liger-kernel, an optional dependency. Its SwiGLU and losses are not used."""

    group_by_length: bool = True
    """Batches of similar length, so that little is padding."""

    disable_tqdm: bool = False
    """No progress bar."""

    ddp_timeout: Positive = 1800
    """Seconds that a collective waits for the other ranks before it is an error."""

    heartbeat_timeout: FromZero = 120
    """Seconds without a sign of life after which a rank is named as missing and the run ends; 0 never."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """``report_to`` as names, each once, without "none"; "all" stands as it is."""
        names = self.report_to if isinstance(self.report_to, list) else [self.report_to]
        return tuple(dict.fromkeys(name for name in names if name != "none"))
