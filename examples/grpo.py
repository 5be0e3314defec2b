"""LoRA by TRL's GRPOTrainer, sparse by three lines. See docs/trainers/preference.md for how to start it.

Rows are {"prompt": ..., "completion": ...}; the reward is how like the completion a sample is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import GRPOConfig, GRPOTrainer

from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, apply_sparselora


@dataclass
class ScriptArguments:
    model: str = field(default="demo/model", metadata={"help": "a model folder or hub name"})
    dtype: str = field(default="float32", metadata={"help": "of the frozen weights; bfloat16 on a GPU"})
    data: str = field(default="demo/data/train.jsonl", metadata={"help": "a JSONL file"})
    sparse_lora: str = field(default="examples/sparse_lora.json", metadata={"help": "what is sparse, and when"})


def alike(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """How like the row's answer a sample is, from 0 to 1."""
    return [SequenceMatcher(None, sample, wanted).ratio() for sample, wanted in zip(completions, answer)]


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, GRPOConfig))
    on_gpu = torch.cuda.is_available()
    parser.set_defaults(use_cpu=not on_gpu, bf16=on_gpu, report_to="none")
    # Before the model is loaded: under ZeRO-3 it is then loaded in shards.
    script, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)

    base = AutoModelForCausalLM.from_pretrained(script.model, dtype=script.dtype, trust_remote_code=False)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    model = get_peft_model(base, lora)
    apply_sparselora(model, SparseLoRAConfig.from_file(script.sparse_lora))

    rows = load_dataset("json", data_files=script.data, split="train").rename_column("completion", "answer")

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=alike,
        args=training,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(script.model, trust_remote_code=False),
        callbacks=[SparseLoRACallback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
