"""Generates the text that the demo's base model is pre-trained on, and the instruction task that it is fine-tuned on.

    python demo/make_corpus.py corpus corpus.txt
    python demo/make_corpus.py task demo/data

A document is a little story: one person, one subject, one mood, told in sentences that show them again and again. A model
of such text learns to keep them in mind. The task asks for the mood and the subject, in a form that the corpus never has:
one sentence that sums the story up. So the base model has what it takes and has never been asked.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SEED = 7
DOCUMENTS = 24_000
TRAIN_ROWS, EVAL_ROWS = 1600, 160

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Ida",
    "Jonas",
    "Kim",
    "Lena",
    "Marco",
    "Nina",
    "Oscar",
    "Paula",
    "Quinn",
    "Rosa",
    "Simon",
    "Tara",
]
SUBJECTS: dict[str, list[str]] = {
    "cooking": ["soup", "bread", "oven", "pan", "sauce", "recipe", "spoon", "onion", "cheese", "kitchen"],
    "football": ["ball", "goal", "team", "referee", "coach", "match", "kick", "stadium", "player", "whistle"],
    "music": ["song", "piano", "drum", "concert", "guitar", "choir", "melody", "band", "violin", "singer"],
    "travel": ["train", "ticket", "hotel", "airport", "map", "suitcase", "bridge", "passport", "island", "harbour"],
    "gardens": ["rose", "soil", "seed", "fence", "tomato", "shovel", "hedge", "lawn", "tree", "flower"],
    "school": ["teacher", "pencil", "lesson", "homework", "classroom", "exam", "book", "desk", "pupil", "chalk"],
    "weather": ["rain", "cloud", "storm", "wind", "snow", "thunder", "fog", "sunshine", "frost", "rainbow"],
    "animals": ["dog", "horse", "rabbit", "sheep", "cat", "goose", "donkey", "fox", "stable", "kitten"],
    "computers": ["keyboard", "screen", "program", "robot", "cable", "printer", "laptop", "mouse", "network", "server"],
    "painting": ["canvas", "brush", "colour", "portrait", "gallery", "easel", "sketch", "frame", "palette", "museum"],
}
MOODS: dict[str, list[str]] = {
    "glad": ["lovely", "bright", "wonderful", "pleasant", "perfect", "cheerful", "excellent", "delightful"],
    "sorry": ["broken", "awful", "dreadful", "boring", "terrible", "gloomy", "useless", "disappointing"],
}
TEMPLATES = (
    "{name} saw the {noun} in the morning.",
    "The {noun} was {mood}.",
    "{name} thought that the {noun} looked {mood}.",
    "Then {name} asked a friend about the {noun}.",
    "What a {mood} {noun}, said {name}.",
    "Next to the {noun} there was a {mood} {noun2}.",
    "After lunch {name} went back to the {noun} and the {noun2}.",
    "Nobody had told {name} that the {noun} would be so {mood}.",
    "In the evening {name} wrote a letter about the {mood} {noun}.",
    "The {noun} and the {noun2} were both {mood}.",
)


def story(random_: random.Random) -> tuple[str, tuple[str, str, str]]:
    """A story of 6 to 9 sentences, and its (person, subject, mood)."""
    name, subject, mood = random_.choice(NAMES), random_.choice(list(SUBJECTS)), random_.choice(list(MOODS))
    sentences = []
    for template in random_.choices(TEMPLATES, k=random_.randint(6, 9)):
        noun, other = random_.sample(SUBJECTS[subject], 2)
        sentences.append(template.format(name=name, noun=noun, noun2=other, mood=random_.choice(MOODS[mood])))
    return " ".join(sentences), (name, subject, mood)


def corpus_document(random_: random.Random) -> str:
    """A story; half of them close with a plain sentence, so that the subjects' and moods' own words occur."""
    text, (name, subject, mood) = story(random_)
    closing = random_.choice(["", "", f" This was a story about {subject}.", f" That day {name} was {mood}."])
    return text + closing


def task_row(random_: random.Random) -> dict[str, str]:
    """A story and its summary."""
    text, (_, subject, mood) = story(random_)
    return {"prompt": f"{text} In the end,", "completion": f" the story was {mood} and about {subject}."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["corpus", "task"])
    parser.add_argument("path", type=Path, help="a text file for the corpus, a folder for the task")
    arguments = parser.parse_args()
    if arguments.kind == "corpus":
        random_ = random.Random(SEED)
        arguments.path.write_text("\n".join(corpus_document(random_) for _ in range(DOCUMENTS)) + "\n")
        return
    random_ = random.Random(SEED + 1)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < TRAIN_ROWS + EVAL_ROWS:
        row = task_row(random_)
        rows[row["prompt"]] = row
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    arguments.path.mkdir(parents=True, exist_ok=True)
    (arguments.path / "train.jsonl").write_text("".join(lines[:TRAIN_ROWS]))
    (arguments.path / "eval.jsonl").write_text("".join(lines[TRAIN_ROWS:]))


if __name__ == "__main__":
    main()
