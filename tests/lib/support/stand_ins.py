"""What Axolotl and LLaMA-Factory make of a YAML file, by Transformers and PEFT alone: both pin other versions of them.

They read the file's own keys, so that a page's command, the file that it names and the plugin or callback in it are executed
as they stand there; where the programs are installed, the commands start those.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)


def peft_model(base: str, rank: int, alpha: int, targets: list[str]) -> PeftModel:
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), lora)


def train(
    kind: type[Trainer], model: PeftModel, args: TrainingArguments, data: Dataset, base: str, callbacks: list[Any]
) -> Trainer:
    """Train and save as both do; ``data`` has prompt and completion, and the prompt has no label."""
    tokenizer = AutoTokenizer.from_pretrained(base)

    def tokenize(row: Mapping[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = data.map(tokenize, remove_columns=data.column_names)
    collate = DataCollatorForSeq2Seq(tokenizer)
    trainer = kind(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=callbacks)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return trainer


def _jsonl(path: Path, columns: Mapping[str, str]) -> Dataset:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{name: row[column] for name, column in columns.items()} for row in lines])


def axolotl_train(cfg: Any, before: Callable[[Any], list[Any]]) -> Trainer:
    """``axolotl train`` on a file that was read; ``before`` gets the PEFT model and gives the callbacks."""
    assert not cfg.train_on_inputs
    (data,) = cfg.datasets
    columns = {"prompt": data["type"]["field_instruction"], "completion": data["type"]["field_output"]}
    args = TrainingArguments(
        output_dir=cfg.output_dir,
        use_cpu=True,
        max_steps=cfg.max_steps,
        per_device_train_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        learning_rate=cfg.learning_rate,
        optim=cfg.optimizer,
        lr_scheduler_type=cfg.lr_scheduler,
        logging_steps=cfg.logging_steps,
        save_steps=cfg.save_steps,
        report_to="none",
    )
    model = peft_model(cfg.base_model, cfg.lora_r, cfg.lora_alpha, list(cfg.lora_target_modules))
    return train(Trainer, model, args, _jsonl(Path(data["path"]), columns), cfg.base_model, before(model))


def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
    """LLaMA-Factory's, of ``llamafactory.train.tuner``: the file is the first argument of the command line."""
    given = args or yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    assert given.pop("stage") == "sft" and given.pop("finetuning_type") == "lora" and not given.pop("train_on_prompt")
    folder = Path(given.pop("dataset_dir"))
    data = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[given.pop("dataset")]
    columns = {"prompt": data["columns"]["prompt"], "completion": data["columns"]["response"]}
    base, targets = given.pop("model_name_or_path"), given.pop("lora_target").split(",")
    model = peft_model(base, given.pop("lora_rank"), given.pop("lora_alpha"), targets)
    for own in ("trust_remote_code", "lora_dropout", "template", "cutoff_len"):
        given.pop(own)
    training = Seq2SeqTrainingArguments(use_cpu=True, **given)  # What is left are the Trainer's own keys.
    train(Seq2SeqTrainer, model, training, _jsonl(folder / data["file_name"], columns), base, list(callbacks or []))
