"""LLaMA-Factory, sparse: its own YAML, and a callback. See docs/trainers/llama_factory.md for how to start it."""

from __future__ import annotations

from llamafactory.train.tuner import run_exp

from sparselora_dist import SparseLoRACallback, SparseLoRAConfig

if __name__ == "__main__":
    run_exp(callbacks=[SparseLoRACallback(SparseLoRAConfig.from_file("examples/sparse_lora.json"))])
