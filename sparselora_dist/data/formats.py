"""Rows of instruction data -> token ids and a mask of trained (label) positions. Pure: no files, no distribution.

| layout                       | ids                                                 | trained                        |
|------------------------------|-----------------------------------------------------|--------------------------------|
| messages                     | the chat template, or the plain layout of `chat.py` | assistant turns                |
| prompt, completion           | [bos] + tok(prompt) + tok(completion) + [eos]       | completion and eos             |
| ... as message lists         | as messages, prompt + completion                    | assistant turns of the latter  |
| instruction, [input], output | as prompt/completion with `alpaca_prompt`           | output and eos                 |
| text                         | [bos] + tok(text) + [eos]                           | everything                     |

Special tokens spelled out in a text are read as such, as everywhere in Transformers. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .chat import describe, is_text, plan_chat, read_messages
from .plans import Piece, Pieces, Plan, SpecialIds

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields by which a layout is recognised; `optional` ones are read when present and not null."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join([*self.required, *(f"[{name}]" for name in self.optional)])


# Order matters: the richest description of a row wins (Alpaca itself carries a `text`, UltraChat a `prompt`).
LAYOUTS = (
    Layout("messages", ("messages",)),
    Layout("prompt-completion", ("prompt", "completion")),
    Layout("instruction", ("instruction", "output"), ("input",)),
    Layout("text", ("text",)),
)


class EncodedRow(NamedTuple):
    """`ids` and `mask` have the same length, at most max_length; `truncated` says whether a tail was dropped."""

    ids: list[int]
    mask: list[bool]
    truncated: bool


def alpaca_prompt(instruction: str, input_text: str = "") -> str:
    """The Alpaca-style prompt; the input block is dropped when there is no input."""
    block = f"### Input:\n{input_text}\n\n" if input_text else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"


def detect_layout(row: object, where: str) -> Layout:
    """The layout of a row by its non-null fields.

    Raises:
        ValueError: the row is no object or has no complete layout; names `where`, the fields seen, the layouts.
    """
    fields = _fields(row, where)
    for layout in LAYOUTS:
        if all(fields.get(name) is not None for name in layout.required):
            return layout
    raise ValueError(_mismatch(fields, where, "no known layout"))


class RowFormatter:
    """Formats the rows of one dataset. The first row decides the layout, and every other row must have it.

    Args:
        tokenizer: a Hugging Face tokenizer; a fast one is called once per batch of rows.
        max_length: longer rows keep their first `max_length` tokens.

    Raises:
        ValueError: max_length below 2 (a label needs a predecessor).
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, since a label needs a predecessor; got {max_length}")
        self.layout: Layout | None = None
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._special = SpecialIds(tokenizer.bos_token_id, tokenizer.eos_token_id)

    def encode(self, rows: Iterable[tuple[str, object]]) -> list[EncodedRow]:
        """Encode (where, row) pairs; `where` is what an error calls the row, such as "train.jsonl:12".

        Raises:
            ValueError: naming `where`, the field and its type, or the fields seen and the accepted layouts.
        """
        plans = [self._plan(row, where) for where, row in rows]
        texts = [text for plan in plans for text in plan.texts]
        encoded = iter(self._tokenize(texts))
        result = []
        for plan in plans:
            ids, mask = plan.build([next(encoded) for _ in plan.texts], self._special)
            cut = self._max_length
            result.append(EncodedRow(ids[:cut], mask[:cut], truncated=len(ids) > cut))
        return result

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: rows longer than the model are expected here and are cut below.
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
        return ids

    def _plan(self, row: object, where: str) -> Plan:
        if self.layout is None:
            self.layout = detect_layout(row, where)
        fields = _fields(row, where)
        if any(fields.get(name) is None for name in self.layout.required):
            raise ValueError(_mismatch(fields, where, f"not the layout of the rows before it ({self.layout})"))
        if self.layout.name == "messages":
            return plan_chat(self._tokenizer, self._messages(fields, "messages", where), where)
        if self.layout.name == "prompt-completion":
            return self._prompt_completion(fields, where)
        if self.layout.name == "instruction":
            instruction, output = _text(fields, "instruction", where), _text(fields, "output", where)
            given = "" if fields.get("input") is None else _text(fields, "input", where)
            return _completion(alpaca_prompt(instruction, given), output)
        return Pieces([Piece(_text(fields, "text", where), trained=True, closed=True)])

    def _prompt_completion(self, fields: Row, where: str) -> Plan:
        prompt, completion = fields["prompt"], fields["completion"]
        for name, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, (str, list, tuple)):
                raise ValueError(f"{where}: field {name!r} must be a string or a message list, got {describe(value)}")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                f"{where}: fields 'prompt' and 'completion' must be both strings or both message lists, "
                f"got {describe(prompt)} and {describe(completion)}"
            )
        if isinstance(prompt, str):
            return _completion(_text(fields, "prompt", where), _text(fields, "completion", where))
        context = self._messages(fields, "prompt", where)
        answer = self._messages(fields, "completion", where)
        if all(message["role"] != "assistant" for message in answer):
            raise ValueError(f"{where}: field 'completion' has no message with the role 'assistant' to train on")
        return plan_chat(self._tokenizer, [*context, *answer], where, first_trained=len(context))

    def _messages(self, fields: Row, name: str, where: str) -> list[dict[str, Any]]:
        return read_messages(fields[name], where, name, templated=bool(self._tokenizer.chat_template))


def encode_row(row: object, tokenizer: Any, max_length: int, where: str = "row") -> EncodedRow:
    """Encode a single row; see `RowFormatter`."""
    return RowFormatter(tokenizer, max_length).encode([(where, row)])[0]


def _completion(prompt: str, completion: str) -> Pieces:
    return Pieces([Piece(prompt, trained=False), Piece(completion, trained=True, closed=True)])


def _fields(row: object, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be an object with fields, got {describe(row)}")
    return row


def _text(fields: Row, name: str, where: str) -> str:
    value = fields[name]
    if not is_text(value):
        raise ValueError(f"{where}: field {name!r} must be a string, got {describe(value)}")
    text: str = value
    return text


def _mismatch(fields: Row, where: str, reason: str) -> str:
    seen = ", ".join(f"{name} (null)" if value is None else str(name) for name, value in fields.items())
    layouts = ", ".join(str(layout) for layout in LAYOUTS)
    return f"{where}: {reason}; fields seen: {seen or 'none'}; accepted layouts: {layouts}"
