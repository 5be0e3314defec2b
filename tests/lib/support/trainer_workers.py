"""What the integration tests run on several ranks: whole runs one after another, and the Hugging Face Trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def observe(config: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """One run, watched: its summary, the masks of every step, and the trained model's logits of ``ids`` (dense)."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.engines import Engine
    from sparselora_dist.train import run
    from sparselora_dist.train.loop import TrainingLoop

    seen: dict[str, Any] = {"masks": [], "logits": None}
    plain_record, plain_run, plain_close = TrainingLoop._record, TrainingLoop.run, Engine.close

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_record(self, *args, **kwargs)
        last = self.context.last
        seen["masks"].append({key: mask.clone() for key, mask in last.masks.items()} if last else {})

    def run_and_look(self: Any) -> Any:
        summary = plain_run(self)
        self.engine.model.eval()
        with torch.no_grad(), self.engine.autocast():
            seen["logits"] = self.engine.model(input_ids=ids, use_cache=False).logits.float().clone()
        return summary

    # A process may do several runs: their process group stays open until the last one.
    TrainingLoop._record, TrainingLoop.run, Engine.close = record, run_and_look, lambda self: None  # type: ignore
    try:
        seen["summary"] = run(RunConfig.from_dict(config))
    finally:
        TrainingLoop._record, TrainingLoop.run, Engine.close = plain_record, plain_run, plain_close  # type: ignore
    return seen


def branch_off(source: Path, target: Path, step: int) -> None:
    """A copy of a run's folder as it was when ``checkpoint-<step>`` was the newest."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "adapter")
    (target / "summary.json").unlink()
    for path in target.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def many_runs(jobs: list[tuple], ids: torch.Tensor) -> list[dict[str, Any]]:
    """``(config, None)`` or ``(config, (source, step))`` one after another; the latter resumes a copy of ``source``."""
    results = []
    for config, origin in jobs:
        if origin and dist.get_rank() == 0:
            branch_off(Path(origin[0]), Path(config["train"]["output_dir"]), origin[1])
        dist.barrier()
        results.append(observe(config, ids))
    return results


def refusals(config: dict[str, Any], changes: list[dict[str, dict[str, Any]]]) -> list[str]:
    """What each run is refused with in which rank 1 has other settings, one after another."""
    told = []
    for change in changes:
        mine = {name: dict(section) for name, section in config.items()}
        if dist.get_rank():
            for name, values in change.items():
                mine[name] |= values
        try:
            observe(mine, torch.zeros(1, 2, dtype=torch.long))
            told.append("accepted")
        except ValueError as error:
            told.append(str(error))
    return told


# --- the Hugging Face Trainer ----------------------------------------------------------------------------------------

STEPS = 8
SPARSE = {"ffn": {"1-2": 0.7}, "qk": {"1": 0.5}, "vo": {"2": 0.5}}


def trainer_rows() -> list[dict[str, list[int]]]:
    """16 rows of one length, prompt and completion."""
    from .models import batch

    columns = {name: tensor.tolist() for name, tensor in batch(rows=16, length=24, padding=False).items()}
    return [{name: column[row] for name, column in columns.items()} for row in range(16)]


def make_sparse(base: Any, **options: Any) -> Any:
    """The base model with the same adapter on every rank and in every process, sparse from half of the run on."""
    from peft import LoraConfig, get_peft_model

    from sparselora_dist import SparseLoRAConfig, apply_sparselora

    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    settings = {"rank": 4, "start_step": 0.5, "layers": SPARSE, **options}
    return apply_sparselora(model, SparseLoRAConfig.from_dict(settings)).train()


def arguments(output_dir: Any, **options: Any) -> Any:
    """``TrainingArguments`` of 8 steps of 4 rows; the options go over them."""
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "seed": 7,
    }
    return TrainingArguments(**settings | options)


def watch() -> Any:
    """A callback that keeps the masks of every step."""
    from transformers import TrainerCallback

    from sparselora_dist import selection

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.masks: list[dict] = []

        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            self.masks.append(selection(model))

    return Watch()


def train(
    model: Any, training: Any, evaluate: bool = False, resume: str | None = None, **options: Any
) -> tuple[Any, list[dict]]:
    """A trained ``Trainer`` and the masks of each step; ``resume`` is a checkpoint of the Trainer."""
    from transformers import Trainer

    from sparselora_dist import SparseLoRACallback

    watcher, rows = watch(), trainer_rows()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=rows[:6] if evaluate else None,
        callbacks=[SparseLoRACallback(), watcher],
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watcher.masks


def with_deepspeed(model_path: str, output_dir: str) -> dict[str, dict[str, Any]]:
    """The Trainer's DeepSpeed integration: the model loaded partitioned (``zero.Init``) and loaded whole before."""
    from transformers import AutoModelForCausalLM

    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": zero, **dict.fromkeys(keys, "auto")}
    settings = {"per_device_train_batch_size": 2, "use_cpu": True, "deepspeed": config}
    results: dict[str, dict[str, Any]] = {}
    for case in ("whole", "partitioned"):
        folder = f"{output_dir}/{case}"
        if case == "whole":
            base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
            training = arguments(folder, **settings)
        else:
            training = arguments(folder, **settings)
            base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        at_load = any(hasattr(p, "ds_tensor") for p in base.parameters())
        trainer, masks = train(make_sparse(base), training)
        sizes: dict[str, list[int]] = {"weights": [0, 0], "factors": [0, 0]}
        for name, p in trainer.model.named_parameters():
            if not p.requires_grad and p.ds_numel > 64:
                kind = sizes["factors" if "estimator" in name else "weights"]
                kind[0] += p.ds_tensor.numel()
                kind[1] += p.ds_numel
        trainer.save_model(folder)
        results[case] = {"log": trainer.state.log_history, "masks": masks, "sizes": sizes, "at_load": at_load}
        del trainer, base, training
    return results
