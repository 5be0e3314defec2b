"""The mark of an adapter that was trained under the zeros of a pruned model: a key of its ``adapter_config.json``.

    "sparse_base": {"modules": ["model.layers.0.self_attn.q_proj", ...]}

Of these modules the weight is ``(W + s·B·A) ⊙ (W ≠ 0)``; base plus adapter without the mask is another model. PEFT knows no
such key: it warns of it by name and leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KEY = "sparse_base"


def marked_config(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """An adapter's config with the mark of ``modules``, named as in the base model's files without ``.weight``; without
    modules it is that of a plain adapter."""
    plain = {key: value for key, value in config.items() if key != KEY}
    names = sorted(set(modules))
    return plain | ({KEY: {"modules": names}} if names else {})


def marked_modules(config: Mapping[str, Any], source: Path) -> tuple[str, ...]:
    """The modules whose masks an adapter was trained under; none of a plain one.

    Args:
        config: what ``adapter_config.json`` holds.
        source: its path, for errors.

    Raises:
        ValueError: the mark is not one.
    """
    mark = config.get(KEY)
    if mark is None:
        return ()
    modules = mark.get("modules") if isinstance(mark, dict) else None
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"{source}: {KEY!r} is {mark!r}: expected the names of modules, {{'modules': [...]}}")
    if unknown := sorted(set(mark) - {"modules"}):
        raise ValueError(f"{source}: {KEY!r} has {unknown[0]!r}, which this version does not know: use a newer one")
    return tuple(modules)


def tell_reader(card: Path, modules: Iterable[str]) -> None:
    """Put :func:`marked_sentence` at the end of an adapter's README, once."""
    text = card.read_text(encoding="utf-8")
    if (sentence := marked_sentence(modules)) not in text:
        card.write_text(f"{text.rstrip()}\n\n{sentence}\n", encoding="utf-8")


def marked_names(config: Any) -> list[str]:
    """The modules that an adapter's config in memory is marked with."""
    mark = getattr(config, KEY, None)
    return list(mark["modules"]) if mark else []


def marked_sentence(modules: Iterable[str]) -> str:
    """What a reader of the adapter's card must know."""
    count = len(set(modules))
    return (
        f"This adapter was trained under the zeros of a pruned base model, in {count} "
        f"{'matrix' if count == 1 else 'matrices'}: its weights are `(W + scaling * B @ A) * (W != 0)`. Added to the base "
        "without the mask, as PEFT adds it, it is another model, with no zeros left. Merge it with `sparselora-dist merge`, "
        "which keeps them, and load the merged model."
    )
