"""Sizes of common models, so that a plan needs neither a download nor a network. Read off their published configs."""

from __future__ import annotations

# (hidden, FFN width, layers, query heads, key/value heads, head width, vocabulary, tied)
Row = tuple[int, int, int, int, int, int, int, bool]
# fmt: off
_LLAMA: dict[str, Row] = {
    "llama-2-7b":      (4096, 11008, 32, 32, 32, 128, 32000, False),
    "llama-2-13b":     (5120, 13824, 40, 40, 40, 128, 32000, False),
    "llama-2-70b":     (8192, 28672, 80, 64, 8, 128, 32000, False),
    "llama-3-8b":      (4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3-70b":     (8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama-3.1-8b":    (4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3.1-70b":   (8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama-3.1-405b":  (16384, 53248, 126, 128, 8, 128, 128256, False),
    "llama-3.2-1b":    (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b":    (3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama-3.3-70b":   (8192, 28672, 80, 64, 8, 128, 128256, False),
}
_MISTRAL: dict[str, Row] = {
    "mistral-7b-v0.1":           (4096, 14336, 32, 32, 8, 128, 32000, False),
    "mistral-7b-v0.2":           (4096, 14336, 32, 32, 8, 128, 32000, False),
    "mistral-7b-v0.3":           (4096, 14336, 32, 32, 8, 128, 32768, False),
    "mistral-nemo-2407":    (5120, 14336, 40, 32, 8, 128, 131072, False),
    "mistral-small-24b-2501": (5120, 32768, 40, 32, 8, 128, 131072, False),
    "mistral-large-2407": (12288, 28672, 88, 96, 8, 128, 32768, False),
}
_QWEN2: dict[str, Row] = {
    "qwen2.5-0.5b":    (896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b":    (1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b":      (2048, 11008, 36, 16, 2, 128, 151936, True),
    "qwen2.5-7b":      (3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-14b":     (5120, 13824, 48, 40, 8, 128, 152064, False),
    "qwen2.5-32b":     (5120, 27648, 64, 40, 8, 128, 152064, False),
    "qwen2.5-72b":     (8192, 29568, 80, 64, 8, 128, 152064, False),
}
_QWEN3: dict[str, Row] = {
    "qwen3-0.6b":      (1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b":      (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b":        (2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b":        (4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b":       (5120, 17408, 40, 40, 8, 128, 151936, False),
    "qwen3-32b":       (5120, 25600, 64, 64, 8, 128, 151936, False),
}
# fmt: on

ROWS: dict[str, dict[str, Row]] = {"llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3}
"""By family, then by the name that :func:`sparselora_dist.plan.shapes.canonical` gives."""
