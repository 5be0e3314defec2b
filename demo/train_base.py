"""Trains the demo's tokenizer and base model from nothing, on the corpus of ``make_corpus.py``.

python demo/train_base.py corpus.txt --output demo/model
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from shapes import SHAPES, hf_config

SEED = 7
SHAPE = SHAPES["demo"]
LENGTH = 128
BATCH = 16
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
LOG_EVERY = 50


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(corpus)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


def build_model() -> LlamaForCausalLM:
    """1.9 M parameters with grouped-query attention; the FFN is wide because that is where the sparsity acts."""
    config = hf_config(SHAPE, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config)


def pack(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Documents, each with bos and eos, in rows of LENGTH tokens."""
    documents = tokenizer(corpus.read_text().splitlines(), add_special_tokens=False)["input_ids"]
    flat = [token for ids in documents for token in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)]
    rows = len(flat) // LENGTH
    return torch.tensor(flat[: rows * LENGTH]).view(rows, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(arguments.corpus)
    data = pack(arguments.corpus, tokenizer)
    data = data[torch.randperm(len(data))]
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {data.numel():,} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, arguments.steps)
    started, total = time.perf_counter(), 0.0
    for step in range(1, arguments.steps + 1):
        rows = data[torch.arange((step - 1) * BATCH, step * BATCH) % len(data)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % LOG_EVERY == 0:
            rate = step * BATCH * LENGTH / (time.perf_counter() - started)
            print(f"step {step}  loss {total / LOG_EVERY:.3f}  {rate:,.0f} tokens/s", flush=True)
            total = 0.0
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
