"""LoRA by the Hugging Face Trainer, sparse by three lines. See docs/trainers/trainer.md for how to start it.

Rows are {"prompt": ..., "completion": ...}; the loss is that of the completion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, apply_sparselora


@dataclass
class ScriptArguments:
    model: str = field(default="demo/model", metadata={"help": "a model folder or hub name"})
    dtype: str = field(default="float32", metadata={"help": "of the frozen weights; bfloat16 on a GPU"})
    data: str = field(default="demo/data/train.jsonl", metadata={"help": "a JSONL file"})
    max_length: int = 256
    sparse_lora: str = field(default="examples/sparse_lora.json", metadata={"help": "what is sparse, and when"})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(use_cpu=not torch.cuda.is_available(), report_to="none")
    # Before the model is loaded: under ZeRO-3 it is then loaded in shards.
    script, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model, trust_remote_code=False)

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + completion
        return {"input_ids": (prompt + completion)[: script.max_length], "labels": labels[: script.max_length]}

    rows = load_dataset("json", data_files=script.data, split="train")
    rows = rows.map(tokenize, remove_columns=rows.column_names)

    base = AutoModelForCausalLM.from_pretrained(script.model, dtype=script.dtype, trust_remote_code=False)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    model = get_peft_model(base, lora)
    apply_sparselora(model, SparseLoRAConfig.from_file(script.sparse_lora))

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[SparseLoRACallback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
