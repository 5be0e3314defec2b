"""How the texts of one row become token ids and a mask of trained positions.

A plan lists the texts it needs tokenised, so that the texts of many rows go through the fast tokenizer in one call;
`build` then puts the pieces of one row together. Nothing here reads a file or knows a field name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Ids = list[int]
Mask = list[bool]


class SpecialIds(NamedTuple):
    """The tokenizer's beginning- and end-of-sequence ids; None where it has none."""

    bos: int | None
    eos: int | None


class Plan(Protocol):
    """What a row needs tokenised, and how the answer becomes (ids, mask), both of the same length."""

    @property
    def texts(self) -> list[str]: ...

    def build(self, encoded: Sequence[Ids], special: SpecialIds) -> tuple[Ids, Mask]: ...


class Piece(NamedTuple):
    """A stretch of text tokenised on its own; `closed` appends the end-of-sequence token to it."""

    text: str
    trained: bool
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Pieces:
    """[bos] + the pieces one after another.

    Tokenising each piece on its own keeps the border between context and answer a border between tokens, which is
    also what generation sees: there the prompt is tokenised without its answer.
    """

    pieces: list[Piece]

    @property
    def texts(self) -> list[str]:
        return [piece.text for piece in self.pieces]

    def build(self, encoded: Sequence[Ids], special: SpecialIds) -> tuple[Ids, Mask]:
        ids: Ids = []
        mask: Mask = []
        # Texts that were templated beforehand may spell out bos or eos already: neither is doubled.
        if special.bos is not None and next((part[0] for part in encoded if part), None) != special.bos:
            ids.append(special.bos)
            mask.append(self.pieces[0].trained)
        for piece, part in zip(self.pieces, encoded):
            ids += part
            mask += [piece.trained] * len(part)
            if piece.closed and special.eos is not None and (not part or part[-1] != special.eos):
                ids.append(special.eos)
                mask.append(piece.trained)
        return ids, mask


class Turn(NamedTuple):
    """One trained assistant turn: the rendered chat before its answer, and through the end of its answer."""

    number: int
    before: str
    through: str


@dataclass(frozen=True, slots=True)
class Templated:
    """A chat rendered by a template without generation markers; answers are located by rendering prefixes.

    The ids are those of the whole chat. `build` raises ValueError when the tokens of a prefix are not the first
    tokens of the whole chat: a label mask cut there would begin or end inside a token.
    """

    where: str
    whole: str
    turns: list[Turn]

    @property
    def texts(self) -> list[str]:
        return [self.whole, *(text for turn in self.turns for text in (turn.before, turn.through))]

    def build(self, encoded: Sequence[Ids], special: SpecialIds) -> tuple[Ids, Mask]:
        ids = list(encoded[0])
        mask = [False] * len(ids)
        for turn, before, through in zip(self.turns, encoded[1::2], encoded[2::2]):
            for prefix, text in ((before, turn.before), (through, turn.through)):
                if not self.whole.startswith(text):
                    raise ValueError(self._message(turn, "rendered up to there, it is not the start of the whole chat"))
                if ids[: len(prefix)] != list(prefix):
                    raise ValueError(self._message(turn, "the tokenizer merges text across its border into one token"))
            mask[len(before) : len(through)] = [True] * (len(through) - len(before))
        return ids, mask

    def _message(self, turn: Turn, reason: str) -> str:
        return (
            f"{self.where}: the assistant turn in message {turn.number} cannot be located in the templated chat: "
            f"{reason}. Use a chat template with {{% generation %}} markers, or a prompt/completion dataset"
        )


@dataclass(frozen=True, slots=True)
class Ready:
    """A row that is tokenised already (chat templates with generation markers mark their own answers)."""

    ids: Ids
    mask: Mask

    @property
    def texts(self) -> list[str]:
        return []

    def build(self, encoded: Sequence[Ids], special: SpecialIds) -> tuple[Ids, Mask]:
        return self.ids, self.mask
