#!/usr/bin/env python3
"""Train the demo model from scratch: a byte-level BPE tokenizer, then a small Llama with grouped-query attention.

Input is the text that ``make_corpus.py corpus`` writes. Output is a Hugging Face model folder in bfloat16 with its
tokenizer. Every document is one row: ``<|bos|>``, its tokens, ``<|eos|>``. Runs on a CPU in some minutes.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
IGNORE = -100
TOKENIZER_DOCUMENTS = 10_000
HELD_OUT_DOCUMENTS = 256
# Batches are cut from runs of this many batches sorted by length, so that rows of a batch need little padding.
BATCHES_PER_SORT = 32
# A long period, as in Llama 3, leaves most coordinates of a head free for matching content rather than position.
ROPE_THETA = 500_000.0
# See warm_start().
CONSTANT_COORDINATE = 5.0
LOOK_BACK_GAIN = 2.0
LOOK_BACK_NOISE = 0.25
SLOW_ANGLE = 0.01
COPY_GAIN = 1.6


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it can encode any text without loss."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[list[int]]:
    """Tokenise documents, each between bos and eos."""
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]


def collate(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows on the right; labels of padding are ignored. Under a causal mask the padding needs no attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
    return ids, labels


def make_batches(rows: list[list[int]], batch: int, rng: random.Random) -> list[list[list[int]]]:
    """Shuffle rows into batches of similar length."""
    order = rng.sample(rows, len(rows))
    batches = []
    for start in range(0, len(order), batch * BATCHES_PER_SORT):
        run = sorted(order[start : start + batch * BATCHES_PER_SORT], key=len)
        batches += [run[i : i + batch] for i in range(0, len(run) - batch + 1, batch)]
    rng.shuffle(batches)
    return batches


def forward_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss, and the logits shifted onto the labels that they predict."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE), logits


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: list[list[int]], pad: int, question: int) -> tuple[float, float]:
    """Held-out loss, and the share of right tokens directly after a question mark (the answers)."""
    model.eval()
    losses, right, asked = [], 0, 0
    for start in range(0, len(rows), 32):
        ids, labels = collate(rows[start : start + 32], pad)
        loss, logits = forward_loss(model, ids, labels)
        losses.append(loss.item())
        answers = ids[:, :-1] == question
        right += int((logits.argmax(-1) == labels[:, 1:])[answers].sum())
        asked += int(answers.sum())
    model.train()
    return sum(losses) / len(losses), right / max(asked, 1)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose feed-forward layers hold most of the weights, since that is where the sparsity acts."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=args.init,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Tokens must not drown in what the layers add at the start: unit embeddings, and small output projections.
        # The output layer starts as a scaled copy of the embedding: what attends to a token predicts that token.
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight * args.init)
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.mul_((2 * args.layers) ** -0.5)
    warm_start(model)
    return model


def head_rows(projection: torch.nn.Linear, head: int, size: int) -> torch.Tensor:
    """The rows of a q, k or v projection that belong to one head, as a view."""
    return projection.weight[head * size : (head + 1) * size]


@torch.no_grad()
def warm_start(model: LlamaForCausalLM) -> None:
    """Start with heads that look back in layer 0 and one faint copying (induction) head in layer 1.

    Gradient descent finds such a pair of heads by itself, but only after a plateau that is long for a CPU. The heads are
    a start only: all weights are trained.

    Layer 0: one embedding coordinate has the same value for all tokens. The keys and the queries read it, and the rotary
    angles of the query of head h are set so that its score peaks h + 1 tokens back. Layer 1: the query reads the current
    token (through ``current``), the key reads the previous token that layer 0 wrote down (through ``previous``), and the
    value copies the attended token (through ``copied``) to the output.
    """
    config = model.config
    size = config.head_dim
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    angles = model.model.rotary_emb.inv_freq
    model.model.embed_tokens.weight[:, 0] = CONSTANT_COORDINATE
    heads = [(first.k_proj, head, 0) for head in range(config.num_key_value_heads)]
    heads += [(first.q_proj, head, head + 1) for head in range(config.num_attention_heads)]
    for projection, head, distance in heads:
        rows = head_rows(projection, head, size)
        rows.mul_(LOOK_BACK_NOISE)
        rows[:, 0] = LOOK_BACK_GAIN * torch.cat([torch.cos(distance * angles), -torch.sin(distance * angles)])

    basis = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size)).Q
    current, previous, copied = basis[:size], basis[size : 2 * size], basis[2 * size : 3 * size]
    slow = (angles < SLOW_ANGLE).repeat(2).unsqueeze(1) * COPY_GAIN
    head_rows(first.v_proj, 0, size).copy_(current)
    first.o_proj.weight[:, :size] = COPY_GAIN * previous.T
    head_rows(second.q_proj, 0, size).copy_(slow * current)
    head_rows(second.k_proj, 0, size).copy_(slow * previous)
    head_rows(second.v_proj, 0, size).copy_(copied)
    second.o_proj.weight[:, :size] = COPY_GAIN * copied.T


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, rows: list[list[int]], held_out: list[list[int]], question: int, args) -> None:
    """Train with AdamW for ``args.steps`` steps and print progress."""
    rng = random.Random(args.seed)
    pad = model.config.pad_token_id
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    batches: list[list[list[int]]] = []
    started, tokens = time.time(), 0
    for step in range(args.steps):
        if not batches:
            batches = make_batches(rows, args.batch, rng)
        ids, labels = collate(batches.pop(), pad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        loss, _ = forward_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int((labels != IGNORE).sum())
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            held_out_loss, accuracy = evaluate(model, held_out, pad, question)
            seconds = time.time() - started
            print(
                f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  held-out {held_out_loss:.3f}  "
                f"answers {accuracy:.1%}  {tokens / 1e6:.1f}M tokens  {tokens / seconds:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument(
        "--vocabulary", type=int, default=640, help="rows of the embedding; the tokenizer may use fewer"
    )
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3_300)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--init", type=float, default=0.08, help="standard deviation of the initial weights")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    documents = args.corpus.read_text(encoding="utf-8").strip().split("\n\n")
    tokenizer = train_tokenizer(documents[:TOKENIZER_DOCUMENTS], args.vocabulary)
    rows = encode(tokenizer, documents)
    question = tokenizer.convert_tokens_to_ids("?")
    model = build_model(args, tokenizer)
    size, count = sum(p.numel() for p in model.parameters()), sum(map(len, rows))
    print(f"{len(tokenizer)} tokens in the vocabulary, {count / 1e6:.1f}M tokens of text, {size / 1e6:.2f}M parameters")
    train(model, rows[HELD_OUT_DOCUMENTS:], rows[:HELD_OUT_DOCUMENTS], question, args)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
