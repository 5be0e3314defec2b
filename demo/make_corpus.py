#!/usr/bin/env python3
"""Generate the text behind the demo model, from a seed and a few word lists.

Two subcommands:

* ``corpus`` writes the pre-training text: little worlds of facts followed by questions, walks through a house, tables,
  key-value lists, and lists of words or symbols to copy, reverse, sort and count. Documents are separated by one blank
  line. What a language model learns from it is to look things up in its context and to copy them.
* ``task`` writes the instruction task as JSONL rows with ``prompt`` and ``completion``: read a stock of facts and write
  the *cards* of the named people, as ``item / colour / number / place``. Neither the prompt format nor the card format
  occurs in the corpus, so the base model cannot do it, but the lookups that it is made of do.

Only the standard library is used, and the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _words(text: str) -> list[str]:
    """Split a list of words at the spaces."""
    return text.split()


NAMES = _words(
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jo Kim Leo Mara Ned Olga Pia Rosa Sam Tom Uma Vera Will Yara Zoe"
)
ITEMS = _words("lamps kites drums boots pens cups keys maps coins bells books hats ropes nuts forks jars dolls tents")
COLOURS = _words("red blue green black white gray pink gold")
PLACES = _words("attic barn cellar garden hall kitchen loft mill office port shed tower")
NUMBERS = [str(number) for number in range(2, 18)]
SYMBOLS = _words("/ ; # ## ### < > = + - * % & @ ~ ^ | [ ] ( ) { } ! x : ,")
EVERYTHING = NAMES + ITEMS + COLOURS + PLACES + NUMBERS + SYMBOLS
FILLERS = (
    "It was a warm day.",
    "The wind was cold.",
    "No one was late.",
    "Then it began to rain.",
    "All was well.",
    "The sun was out.",
    "There was a lot to do.",
)

FACT_TEMPLATES = (
    "{name} has {number} {colour} {item} in the {place}.",
    "{name} keeps {number} {colour} {item} in the {place}.",
    "In the {place} {name} has {number} {colour} {item}.",
    "The {number} {colour} {item} of {name} are in the {place}.",
)
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What does {name} have?", "{item}"),
    ("What colour are the {item} of {name}?", "{colour}"),
    ("What colour are the {item}?", "{colour}"),
    ("What colour does {name} like?", "{colour}"),
    ("How many {item} are there?", "{number}"),
    ("How many does {name} have?", "{number}"),
    ("Where are the {item}?", "{place}"),
    ("Where is the stock of {name}?", "{place}"),
    ("Who has {item}?", "{name}"),
    ("Who is in the {place}?", "{name}"),
)

TASK_FACTS = (7, 8)
TASK_CARDS = 3


@dataclass(frozen=True)
class Fact:
    """One person's stock: who, what, how many, which colour, and where."""

    name: str
    item: str
    colour: str
    number: str
    place: str

    def fill(self, template: str) -> str:
        """Put the fields into a template."""
        return template.format(**vars(self))


def make_world(rng: random.Random, size: int) -> list[Fact]:
    """Draw ``size`` facts; names, items and places are distinct within a world."""
    names, items, places = rng.sample(NAMES, size), rng.sample(ITEMS, size), rng.sample(PLACES, size)
    return [
        Fact(name, item, rng.choice(COLOURS), rng.choice(NUMBERS), place)
        for name, item, place in zip(names, items, places)
    ]


def tell(rng: random.Random, world: list[Fact], filler_rate: float = 0.0) -> str:
    """Tell the facts of a world in one paragraph, with an idle sentence now and then."""
    sentences = []
    for fact in world:
        sentences.append(fact.fill(rng.choice(FACT_TEMPLATES)))
        if rng.random() < filler_rate:
            sentences.append(rng.choice(FILLERS))
    return " ".join(sentences)


def stock_document(rng: random.Random) -> str:
    """Facts, then single questions about them with their answers."""
    world = make_world(rng, rng.randint(3, 8))
    lines = [tell(rng, world, filler_rate=0.1)]
    for _ in range(rng.randint(6, 9)):
        question, answer = rng.choice(QUESTIONS)
        fact = rng.choice(world)
        lines.append(f"{fact.fill(question)} {fact.fill(answer)}")
    return "\n".join(lines)


def recall_document(rng: random.Random) -> str:
    """Facts, then some of them told again, in the same or in other words, for people who are named."""
    world = make_world(rng, rng.randint(3, 7))
    lines = [tell(rng, world)]
    for fact in rng.sample(world, rng.randint(2, min(4, len(world)))):
        template = rng.choice(FACT_TEMPLATES)
        lines.append(f"Tell me of {fact.name}. {fact.fill(template)}")
    return "\n".join(lines)


def report_document(rng: random.Random) -> str:
    """Facts, then a report of one field of several people in the order in which they are named."""
    world = make_world(rng, rng.randint(3, 7))
    lines = [tell(rng, world)]
    for _ in range(rng.randint(2, 4)):
        field = rng.choice(["item", "colour", "number", "place"])
        chosen = rng.sample(world, min(3, len(world)))
        names = ", ".join(fact.name for fact in chosen)
        lines.append(f"The {field} of {names}: " + ", ".join(str(getattr(fact, field)) for fact in chosen))
    return "\n".join(lines)


def table_document(rng: random.Random) -> str:
    """A table with shuffled columns, then cells looked up by row and column."""
    columns = ["name", *rng.sample(["item", "colour", "number", "place"], rng.randint(2, 4))]
    world = make_world(rng, rng.randint(3, 6))
    lines = ["Table: " + ", ".join(columns)]
    lines += [" " + ", ".join(str(getattr(fact, column)) for column in columns) for fact in world]
    for _ in range(rng.randint(4, 7)):
        fact, column = rng.choice(world), rng.choice(columns[1:])
        lines.append(f"The {column} of {fact.name}: {getattr(fact, column)}")
    return "\n".join(lines)


def walk_document(rng: random.Random) -> str:
    """People walk from place to place; the last place counts."""
    names = rng.sample(NAMES, rng.randint(2, 4))
    where = {name: rng.choice(PLACES) for name in names}
    lines = [" ".join(f"{name} is in the {place}." for name, place in where.items())]
    for _ in range(rng.randint(2, 5)):
        name = rng.choice(names)
        where[name] = rng.choice([place for place in PLACES if place != where[name]])
        lines.append(f"{name} goes to the {where[name]}.")
        asked = rng.choice(names)
        lines.append(f"Where is {asked}? {where[asked]}")
    return "\n".join(lines)


def pairs_document(rng: random.Random) -> str:
    """Key-value pairs of mixed words, then the values of some keys."""
    keys = rng.sample(ITEMS + NAMES + PLACES, rng.randint(5, 12))
    values = [rng.choice(COLOURS + NUMBERS + ITEMS + PLACES + SYMBOLS) for _ in keys]
    sign = rng.choice(["is", "=", ":", "->"])
    lines = ["Pairs: " + ", ".join(f"{key} {sign} {value}" for key, value in zip(keys, values))]
    for _ in range(rng.randint(6, 9)):
        index = rng.randrange(len(keys))
        lines.append(f"Get {keys[index]} {sign} {values[index]}")
    return "\n".join(lines)


def echo_document(rng: random.Random) -> str:
    """One long list of words or symbols and two or three copies of it; the easiest text to learn copying from."""
    words = " ".join(rng.sample(EVERYTHING, rng.randint(6, 20)))
    return "\n".join([f"List: {words}", *[f"Again: {words}"] * rng.randint(2, 3)])


def list_document(rng: random.Random) -> str:
    """Lists of words or symbols to copy, reverse, sort and count."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        words = rng.sample(rng.choice([NAMES, ITEMS, PLACES, SYMBOLS, SYMBOLS, EVERYTHING]), rng.randint(4, 9))
        lines.append("List: " + " ".join(words))
        order = rng.choice(["Again", "Again", "Backwards", "Sorted"])
        if order == "Backwards":
            words = words[::-1]
        elif order == "Sorted":
            words = sorted(words)
        lines.append(f"{order}: " + " ".join(words))
        lines.append(f"Count: {len(words)}")
    return "\n".join(lines)


DOCUMENTS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (stock_document, 6),
    (recall_document, 4),
    (report_document, 4),
    (table_document, 2),
    (walk_document, 1),
    (pairs_document, 2),
    (list_document, 2),
    (echo_document, 1),
)
# The corpus begins with documents that teach copying alone: without them the lookups take far longer to be learnt.
FIRST_DOCUMENTS: tuple[tuple[Callable[[random.Random], str], int], ...] = ((echo_document, 3), (pairs_document, 1))


def task_row(rng: random.Random) -> dict[str, str]:
    """One row of the instruction task: a stock of facts, the people asked for, and their cards."""
    world = make_world(rng, rng.randint(*TASK_FACTS))
    chosen = rng.sample(world, TASK_CARDS)
    names = ", ".join(fact.name for fact in chosen)
    prompt = f"### Stock\n{tell(rng, world)}\n### Task\nWrite cards for {names}\n### Cards\n"
    cards = [fact.fill("{item} / {colour} / {number} / {place}") for fact in chosen]
    return {"prompt": prompt, "completion": " " + " ; ".join(cards)}


def write_corpus(path: Path, documents: int, first: int, seed: int) -> None:
    """Write the pre-training corpus."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = []
    for kinds, count in ((FIRST_DOCUMENTS, first), (DOCUMENTS, documents - first)):
        makers, weights = [maker for maker, _ in kinds], [weight for _, weight in kinds]
        texts += [maker(rng) for maker in rng.choices(makers, weights, k=count)]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"corpus: {documents} documents, {path.stat().st_size / 1e6:.1f} MB in {path}")


def write_task(folder: Path, train_rows: int, eval_rows: int, seed: int) -> None:
    """Write train.jsonl and eval.jsonl; no prompt occurs twice in the two files together."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < train_rows + eval_rows:
        row = task_row(rng)
        rows.setdefault(row["prompt"], row["completion"])
    pairs = list(rows.items())
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", pairs[:train_rows]), ("eval", pairs[train_rows:])):
        path = folder / f"{split}.jsonl"
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in part]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"task: {len(part)} rows, {path.stat().st_size / 1e3:.0f} kB in {path}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write the pre-training text")
    corpus.add_argument("path", type=Path)
    corpus.add_argument("--documents", type=int, default=80_000)
    corpus.add_argument("--first", type=int, default=8_000, help="how many of the documents only teach copying")
    corpus.add_argument("--seed", type=int, default=1)
    task = commands.add_parser("task", help="write the instruction task")
    task.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "data")
    task.add_argument("--train-rows", type=int, default=2_000)
    task.add_argument("--eval-rows", type=int, default=160)
    task.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    if args.command == "corpus":
        write_corpus(args.path, args.documents, args.first, args.seed)
    else:
        write_task(args.folder, args.train_rows, args.eval_rows, args.seed)


if __name__ == "__main__":
    main()
