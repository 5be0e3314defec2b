"""Chats: a list of {role, content} messages -> a plan, with the loss on assistant turns only.

Three ways, in this order: a chat template with `{% generation %}` markers says itself which tokens are the
assistant's; any other chat template is rendered for prefixes of the chat; a tokenizer without one gets the plain layout

    System: {content}\n
    User: {content}\n
    Assistant: {content}<eos>

where the tokens of " {content}" and <eos> are trained, and the next turn follows <eos> directly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .plans import Piece, Pieces, Plan, Ready, Templated, Turn

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = dict[str, Any]


def is_text(value: object) -> bool:
    """True for a string that UTF-8 can carry: JSON can smuggle in half a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def describe(value: object) -> str:
    """What an error message calls a refused value: its type, never its (possibly huge) content."""
    if isinstance(value, str):
        return "a string with unpaired surrogates" if not is_text(value) else "a string"
    return "null" if value is None else f"a value of type {type(value).__name__}"


def read_messages(value: object, where: str, field: str, templated: bool) -> list[Message]:
    """Check a message list and return plain dictionaries without null entries.

    Raises:
        ValueError: names `where`, the field and the message when it is not a non-empty list of objects with a string
            `role` and a string `content`. A templated message with `tool_calls` may do without `content`.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: field {field!r} must be a list of messages, got {describe(value)}")
    if not value:
        raise ValueError(f"{where}: field {field!r} is an empty list of messages")
    messages: list[Message] = []
    for number, message in enumerate(value):
        name = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: {name} must be an object with 'role' and 'content', got {describe(message)}")
        # Arrow fills the keys that only some messages have with null.
        kept = {key: entry for key, entry in message.items() if entry is not None}
        if not is_text(kept.get("role")):
            raise ValueError(f"{where}: {name}['role'] must be a string, got {describe(kept.get('role'))}")
        without_content = templated and "content" not in kept and bool(kept.get("tool_calls"))
        if not without_content and not is_text(kept.get("content")):
            raise ValueError(f"{where}: {name}['content'] must be a string, got {describe(kept.get('content'))}")
        messages.append(kept)
    return messages


def plan_chat(tokenizer: Any, messages: list[Message], where: str, first_trained: int = 0) -> Plan:
    """The plan of one chat; assistant turns from message `first_trained` on are trained.

    Raises:
        ValueError: naming `where`, when the template refuses the chat or an answer cannot be located in it.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None:
        return _plain(messages, first_trained)
    # The markers are read through character offsets, which only fast tokenizers know.
    if _GENERATION.search(template) and tokenizer.is_fast:
        return _marked(tokenizer, messages, where, first_trained)
    whole = _render(tokenizer, messages, where)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first_trained:
            continue
        if number == 0:
            raise ValueError(
                f"{where}: the chat opens with an assistant turn, which prefixes of the chat cannot locate; "
                "drop that message, or use a chat template with {% generation %} markers"
            )
        before = _render(tokenizer, messages[:number], where, add_generation_prompt=True)
        last = number == len(messages) - 1
        turns.append(Turn(number, before, whole if last else _render(tokenizer, messages[: number + 1], where)))
    return Templated(where, whole, turns)


def _plain(messages: list[Message], first_trained: int) -> Pieces:
    pieces: list[Piece] = []
    context = ""
    for number, message in enumerate(messages):
        content = message["content"]
        if message["role"] != "assistant":
            context += f"{message['role'].capitalize()}: {content}\n"
            continue
        # The space goes with the answer: byte-level vocabularies hold " word" as one token, and a prompt
        # that ends in a space would never be met at generation.
        pieces.append(Piece(context + "Assistant:", trained=False))
        pieces.append(Piece(f" {content}" if content else "", trained=number >= first_trained, closed=True))
        context = ""
    if context:
        pieces.append(Piece(context, trained=False))
    return Pieces(pieces)


def _marked(tokenizer: Any, messages: list[Message], where: str, first_trained: int) -> Ready:
    out = _apply(tokenizer, messages, where, return_dict=True, return_assistant_tokens_mask=True)
    ids = list(out["input_ids"])
    mask = [bool(flag) for flag in out["assistant_masks"]]
    if first_trained:
        prompt = _apply(tokenizer, messages[:first_trained], where, return_dict=True, add_generation_prompt=True)
        cut = list(prompt["input_ids"])
        if ids[: len(cut)] != cut:
            raise ValueError(f"{where}: the tokens of the templated prompt are not the first tokens of the whole chat")
        mask[: len(cut)] = [False] * len(cut)
    return Ready(ids, mask)


def _render(tokenizer: Any, messages: list[Message], where: str, add_generation_prompt: bool = False) -> str:
    text: str = _apply(tokenizer, messages, where, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text


def _apply(tokenizer: Any, messages: list[Message], where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template may raise anything, and must not hide which row it was
        raise ValueError(f"{where}: the chat template refused this chat: {type(error).__name__}: {error}") from error
