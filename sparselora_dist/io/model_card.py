"""The model card of an adapter folder: what it was trained on, how, and what it reached."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..config.run import RunConfig
from .loftq import Mark, loftq_sentence
from .marker import marked_names, marked_sentence

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_PACKAGES = ("torch", "transformers", "peft")


def write_model_card(model: Any, folder: Path, config: RunConfig, summary: dict[str, Any]) -> None:
    """Write ``README.md`` beside a saved adapter.

    Args:
        model: the PEFT model; it knows the card's metadata (base model, library, task, tags).
        folder: of the adapter.
        config: the run. Paths stand in the card as the run file gives them.
        summary: what ``summary.json`` holds.
    """
    path = folder / "README.md"
    path.unlink(missing_ok=True)
    model.create_or_update_model_card(str(folder))
    data = ModelCard.load(path).data
    data.tags = sorted({*(data.tags or ()), "sparselora"})
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        base=config.model.name_or_path,
        name=Path(config.model.name_or_path).name,
        config=config,
        lora=model.peft_config["default"],
        summary=summary,
        masked=marked_sentence(masked) if (masked := marked_names(model.peft_config["default"])) else None,
        loftq=loftq_sentence(Mark.of(config.quantization, rounds)) if (rounds := config.lora.loftq_rounds) else None,
        results=_results(summary),
        versions={name: _version(name) for name in ("sparselora-dist", *_PACKAGES)},
    )
    card.save(path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # Run from a checkout, without an installation.
        return "not installed"


def _results(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of figure, before, after; what was not measured is left out."""
    rows = [
        ("evaluation loss, nats per label token", "eval_loss_start", "eval_loss", ".4f"),
        ("token accuracy", "eval_mean_token_accuracy_start", "eval_mean_token_accuracy", ".1%"),
        ("exact match", "eval_exact_match_start", "eval_exact_match", ".1%"),
        ("training loss (first, last step)", "train_loss_first", "train_loss_last", ".4f"),
    ]
    return [
        (label, _show(summary.get(before), form), _show(summary.get(after), form))
        for label, before, after, form in rows
        if summary.get(after) is not None
    ]


def _show(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)
