"""Sources (JSON, saved folders, names), their refusals, and the flat storage."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sparselora_dist.data import TokenDataset, collate, load_dataset_tokens

ROWS = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "efg"}]
LONG = 10_000


def texts(dataset: TokenDataset, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(dataset[i][0]) for i in range(len(dataset))]


def test_jsonl(tokenizer: Any, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl(ROWS[0], "", ROWS[1])  # a blank line is no row
    dataset = load_dataset_tokens(path, tokenizer, LONG)
    assert texts(dataset, tokenizer) == ["<bos>abc<eos>", "<bos>defg<eos>"]
    assert (dataset.tokens.dtype, dataset.mask.dtype, dataset.offsets.dtype) == (np.int32, np.bool_, np.int64)
    assert dataset.lengths.tolist() == [5, 6]
    assert dataset.label_counts.tolist() == [2, 4]
    assert (dataset.truncated_rows, dataset.unlabelled_rows) == (0, 0)
    assert len(load_dataset_tokens(path, tokenizer, LONG, limit=1)) == 1


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_list_and_json_lines_in_a_json_file(tokenizer: Any, tmp_path: Path, bom: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(bom + json.dumps(ROWS, indent=1).encode())
    listed = load_dataset_tokens(str(path), tokenizer, LONG)
    path.write_bytes(bom + "\n".join(map(json.dumps, ROWS)).encode())
    lines = load_dataset_tokens(str(path), tokenizer, LONG)
    assert texts(listed, tokenizer) == texts(lines, tokenizer) == ["<bos>abc<eos>", "<bos>defg<eos>"]


def test_many_rows_cross_the_tokenizer_batches(tokenizer: Any, write_jsonl: Callable[..., str]) -> None:
    dataset = load_dataset_tokens(write_jsonl(*({"text": str(i)} for i in range(1100))), tokenizer, LONG)
    assert texts(dataset, tokenizer) == [f"<bos>{i}<eos>" for i in range(1100)]


def test_saved_folder_with_and_without_splits(tokenizer: Any, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "flat"))
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(str(tmp_path / "splits"))
    assert len(load_dataset_tokens(str(tmp_path / "flat"), tokenizer, LONG)) == 2
    splits = str(tmp_path / "splits")
    assert texts(load_dataset_tokens(splits, tokenizer, LONG), tokenizer) == ["<bos>abc<eos>", "<bos>defg<eos>"]
    for named in ({"path_or_name": splits, "split": "test"}, {"path_or_name": f"{splits}:test"}):
        assert texts(load_dataset_tokens(tokenizer=tokenizer, max_length=LONG, **named), tokenizer) == [
            "<bos>defg<eos>"
        ]
    with pytest.raises(ValueError, match="has no split 'dev'; it has: train, test"):
        load_dataset_tokens(splits, tokenizer, LONG, split="dev")
    with pytest.raises(ValueError, match=r"data.eval: the folder .* was not saved by datasets.save_to_disk"):
        load_dataset_tokens(str(tmp_path), tokenizer, LONG, key="data.eval")


def test_saved_chats_survive_arrow(tokenizer: Any, tmp_path: Path) -> None:
    # Arrow gives every message the union of the keys, null where a message had none.
    messages = [{"role": "user", "content": "q", "name": "x"}, {"role": "assistant", "content": "r"}]
    datasets.Dataset.from_list([{"messages": messages}]).save_to_disk(str(tmp_path / "d"))
    dataset = load_dataset_tokens(str(tmp_path / "d"), tokenizer, LONG)
    assert texts(dataset, tokenizer) == ["<bos>User: q\nAssistant: r<eos>"]
    datasets.Dataset.from_list([{"text": "a"}, {"text": None}]).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(ValueError, match=r"/e: row 2: not the layout .* fields seen: text \(null\)"):
        load_dataset_tokens(str(tmp_path / "e"), tokenizer, LONG)


def test_hub_name_and_split(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def load(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    load_dataset_tokens("owner/name", tokenizer, LONG)
    load_dataset_tokens("owner/name:test[:10]", tokenizer, LONG)
    # Nothing else is passed on: no script, no remote code.
    assert asked == [(("owner/name",), {"split": "train"}), (("owner/name",), {"split": "test[:10]"})]


def test_unreachable_name(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"dta/train \(set by data.train\) is neither a file or folder.*offline"
    ):
        load_dataset_tokens("dta/train", tokenizer, LONG)


@pytest.mark.parametrize("path", ["missing.jsonl", "/no/such/folder", "./here", "~/there", "a/b/c"])
def test_missing_file(tokenizer: Any, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist \(set by data.train;") as caught:
        load_dataset_tokens(path, tokenizer, LONG)
    assert str(caught.value).startswith(path)


def test_refused_sources(tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"data.train: .*rows.pkl has the suffix '.pkl'; accepted: .jsonl, .json"):
        load_dataset_tokens(write_jsonl("x", name="rows.pkl"), tokenizer, LONG)
    with pytest.raises(ValueError, match=r"the dataset .*rows.jsonl is empty"):
        load_dataset_tokens(write_jsonl(""), tokenizer, LONG)
    with pytest.raises(ValueError, match="limit must be at least 1 or None, got 0"):
        load_dataset_tokens(write_jsonl(ROWS[0]), tokenizer, LONG, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"rows.jsonl:3: not valid JSON: .*column 13.*one JSON object per line"),
        ("{", r"rows.jsonl:3: not valid JSON"),
        ('["b"]', r"rows.jsonl:3: a row must be an object with fields, got a value of type list"),
        ('{"txt": "b"}', r"rows.jsonl:3: not the layout of the rows before it \(text\); fields seen: txt"),
        ("[" * 100_000, r"rows.jsonl:3: refused JSON: "),
        ('{"text": ' + "1" * 5000 + "}", r"rows.jsonl:3: refused JSON: "),
    ],
)
def test_broken_lines_are_named(tokenizer: Any, write_jsonl: Callable[..., str], line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset_tokens(write_jsonl({"text": "a"}, "", line, {"text": "c"}), tokenizer, LONG)


def test_broken_bytes_and_broken_lists_are_named(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows.json:2: not UTF-8 text"):
        load_dataset_tokens(str(path), tokenizer, LONG)
    path.write_text('[\n {"text": "a"},\n {"text": }\n]')
    with pytest.raises(ValueError, match=r"rows.json:3: not valid JSON"):
        load_dataset_tokens(str(path), tokenizer, LONG)
    path.write_text('[{"text": "a"}, {"text": 1}]')
    with pytest.raises(ValueError, match=r"rows.json: row 2: field 'text' must be a string"):
        load_dataset_tokens(str(path), tokenizer, LONG)


def test_cut_labels_are_kept_and_counted(
    tokenizer: Any, write_jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl({"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"})
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_tokens(path, tokenizer, 4)
    assert dataset.label_counts.tolist() == [0, 2]
    assert (len(dataset), dataset.truncated_rows, dataset.unlabelled_rows) == (2, 1, 1)
    assert "1 of 2 rows were cut to 4 tokens; 1 rows have no label left" in caplog.text
    with pytest.raises(ValueError, match=r"no row of .* has a position to train on \(2 of 2 rows were cut"):
        load_dataset_tokens(path, tokenizer, 2)


def test_label_counts_are_the_shifted_losses() -> None:
    # Trained first positions, an empty row, an untrained row, empty rows at both ends.
    rows = [[], [1], [1, 1, 0], [], [0, 0], [0, 1, 1, 1], []]
    mask = np.array([flag for row in rows for flag in row], dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, rows)])
    dataset = TokenDataset("d", np.arange(mask.size), mask, offsets)
    labels = collate(dataset, range(len(rows)), pad_token_id=0)["labels"]
    assert dataset.label_counts.tolist() == (labels[:, 1:] != -100).sum(1).tolist() == [0, 0, 1, 0, 0, 3, 0]


def test_dataset_is_immutable_and_checked() -> None:
    tokens = np.arange(3, dtype=np.int32)
    dataset = TokenDataset("d", tokens, np.ones(3), np.array([0, 3]))
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0][0] = 9
    tokens[0] = 9  # the caller's own array stays his
    for index in (-1, 1):
        with pytest.raises(IndexError, match=rf"d: row {index} is not within 0..0"):
            dataset[index]
    with pytest.raises(ValueError, match="disagree on the number of tokens: 2, 3 and 3"):
        TokenDataset("d", tokens, np.ones(3), np.array([0, 2]))
    with pytest.raises(ValueError, match="start at 0 and never fall"):
        TokenDataset("d", tokens, np.ones(3), np.array([0, 4, 3]))


def test_real_math_rows(real_tokenizer: Any, real_data: Callable[[str], Path]) -> None:
    path = real_data("math/train.jsonl")
    dataset = load_dataset_tokens(str(path), real_tokenizer, 512)
    with path.open() as file:
        rows = [json.loads(line) for line in file]
    assert len(dataset) == len(rows) and dataset.unlabelled_rows == 0 and dataset.truncated_rows == 0
    for index in (0, len(rows) // 2, len(rows) - 1):
        ids, mask = dataset[index]
        assert real_tokenizer.decode(ids[mask]) == rows[index]["output"] + real_tokenizer.eos_token
        prompt = f"### Instruction:\n{rows[index]['instruction']}\n\n### Response:\n"
        assert real_tokenizer.decode(ids[~mask]) == real_tokenizer.bos_token + prompt


def test_real_chats(real_tokenizer: Any, real_data: Callable[[str], Path]) -> None:
    path = real_data("math/gsm8k_train_messages.jsonl")
    dataset = load_dataset_tokens(str(path), real_tokenizer, 1024, limit=500)
    with path.open() as file:
        question, answer = (message["content"] for message in json.loads(file.readline())["messages"])
    ids, mask = dataset[0]
    assert real_tokenizer.decode(ids[mask]) == f" {answer}{real_tokenizer.eos_token}"
    assert real_tokenizer.decode(ids[~mask]) == f"{real_tokenizer.bos_token}User: {question}\nAssistant:"
