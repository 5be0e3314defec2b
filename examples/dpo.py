"""LoRA by TRL's DPOTrainer, sparse by three lines. See docs/trainers/preference.md for how to start it.

Rows are {"prompt": ..., "completion": ...}; the answer that is rejected is the next row's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import DPOConfig, DPOTrainer

from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, apply_sparselora


@dataclass
class ScriptArguments:
    model: str = field(default="demo/model", metadata={"help": "a model folder or hub name"})
    dtype: str = field(default="float32", metadata={"help": "of the frozen weights; bfloat16 on a GPU"})
    data: str = field(default="demo/data/train.jsonl", metadata={"help": "a JSONL file"})
    sparse_lora: str = field(default="examples/sparse_lora.json", metadata={"help": "what is sparse, and when"})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DPOConfig))
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

    rows = load_dataset("json", data_files=script.data, split="train")
    answers = rows["completion"]
    rows = rows.rename_column("completion", "chosen").add_column("rejected", [*answers[1:], answers[0]])

    trainer = DPOTrainer(
        model=model,
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
