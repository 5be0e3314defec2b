"""Every layout: the exact ids, which of them are trained, and what each refusal says."""

from __future__ import annotations

from typing import Any

import pytest

from sparselora_dist.data import RowFormatter, alpaca_prompt, encode_row

TEMPLATE = (
    "<bos>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "<bos>{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LONG = 10_000


def chat(*turns: str) -> list[dict[str, str]]:
    """ "u:hi", "a:yo" -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def shown(tokenizer: Any, row: Any, max_length: int = LONG) -> tuple[str, str]:
    """The whole text, and the same with untrained tokens as dots (one per token)."""
    ids, mask, _ = encode_row(row, tokenizer, max_length)
    assert len(ids) == len(mask)
    tokens = [tokenizer.decode([token]) for token in ids]
    return "".join(tokens), "".join(token if trained else "." for token, trained in zip(tokens, mask))


def fails(row: Any, tokenizer: Any, *parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        encode_row(row, tokenizer, LONG, where="train.jsonl:7")
    for part in ("train.jsonl:7", *parts):
        assert part in str(caught.value)


# --- prompt/completion, instruction, text ---------------------------------------------------------------------------


def test_prompt_completion_ids(tokenizer: Any) -> None:
    ids, mask, truncated = encode_row({"prompt": "ab", "completion": "cd"}, tokenizer, LONG)
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    assert ids == [tokenizer.bos_token_id, a, b, c, d, tokenizer.eos_token_id]
    assert mask == [False, False, False, True, True, True]
    assert not truncated


def test_completion_is_tokenised_on_its_own(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(merges=(("b", "c"),))
    assert shown(tokenizer, {"prompt": "ab", "completion": "cbc"}) == ("<bos>abcbc<eos>", "...cbc<eos>")


def test_special_tokens_in_the_text_are_not_doubled(tokenizer: Any) -> None:
    row = {"prompt": "<bos>ab", "completion": "cd<eos>"}
    assert shown(tokenizer, row) == ("<bos>abcd<eos>", "...cd<eos>")


def test_tokenizer_without_special_tokens(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(specials=False)
    assert shown(tokenizer, {"prompt": "ab", "completion": "cd"}) == ("abcd", "..cd")


def test_instruction_with_and_without_input(tokenizer: Any) -> None:
    whole, trained = shown(tokenizer, {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3"})
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert whole == f"<bos>{prompt}3<eos>"
    assert trained == "." * (1 + len(prompt)) + "3<eos>"
    without = "### Instruction:\nAdd.\n\n### Response:\n"
    assert alpaca_prompt("Add.") == without
    for row in ({"input": ""}, {"input": None}, {}):
        assert shown(tokenizer, {"instruction": "Add.", "output": "3", **row})[0] == f"<bos>{without}3<eos>"


def test_text_trains_every_token(tokenizer: Any) -> None:
    assert shown(tokenizer, {"text": "abc"}) == ("<bos>abc<eos>", "<bos>abc<eos>")


def test_empty_completion_still_learns_to_stop(tokenizer: Any) -> None:
    assert shown(tokenizer, {"prompt": "ab", "completion": ""}) == ("<bos>ab<eos>", "...<eos>")


def test_richest_layout_wins(tokenizer: Any) -> None:
    row = {"messages": chat("u:q", "a:r"), "prompt": "x", "completion": "y", "text": "z"}
    assert "User: q" in shown(tokenizer, row)[0]
    row = {"instruction": "x", "output": "y", "text": "z"}
    assert "### Instruction" in shown(tokenizer, row)[0]
    row = {"messages": None, "text": "z"}
    assert shown(tokenizer, row)[0] == "<bos>z<eos>"


# --- chats ----------------------------------------------------------------------------------------------------------


def test_plain_chat_single_and_multi_turn(tokenizer: Any) -> None:
    row = {"messages": chat("s:Be brief.", "u:hi", "a:yo", "u:bye", "a:ok")}
    first, second = "System: Be brief.\nUser: hi\nAssistant:", "User: bye\nAssistant:"
    whole, trained = shown(tokenizer, row)
    assert whole == f"<bos>{first} yo<eos>{second} ok<eos>"
    assert trained == "." * (1 + len(first)) + " yo<eos>" + "." * len(second) + " ok<eos>"


def test_plain_chat_ending_with_the_user_and_empty_answer(tokenizer: Any) -> None:
    whole, trained = shown(tokenizer, {"messages": chat("u:hi", "a:", "u:bye")})
    assert whole == "<bos>User: hi\nAssistant:<eos>User: bye\n"
    assert trained.replace(".", "") == "<eos>"


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["prefixes", "generation markers"])
def test_templated_chat(make_tokenizer: Any, template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = chat("s:S", "u:hi", "a:yo", "u:bye", "a:ok")
    whole, trained = shown(tokenizer, {"messages": messages})
    assert whole == "<bos><|system|>S<end><|user|>hi<end><|assistant|>yo<end><|user|>bye<end><|assistant|>ok<end>"
    assert trained == "." * 9 + "yo<end>" + "." * 6 + "ok<end>"
    ids = encode_row({"messages": messages}, tokenizer, LONG).ids
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("template", [None, TEMPLATE, MARKED], ids=["plain", "prefixes", "generation markers"])
def test_prompt_completion_chats_train_the_completion_only(make_tokenizer: Any, template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    row = {"prompt": chat("u:a", "a:b", "u:c"), "completion": chat("a:d")}
    whole, trained = shown(tokenizer, row)
    assert trained.strip(".") == {None: " d<eos>"}.get(template, "d<end>")
    assert whole == shown(tokenizer, {"messages": row["prompt"] + row["completion"]})[0]


def test_marked_chat_may_open_with_the_assistant(make_tokenizer: Any) -> None:
    assert shown(make_tokenizer(MARKED), {"messages": chat("a:yo", "u:hi")})[1] == "..yo<end>...."
    fails({"messages": chat("a:yo", "u:hi")}, make_tokenizer(TEMPLATE), "opens with an assistant turn")


def test_chat_without_an_answer_has_no_label(make_tokenizer: Any) -> None:
    for template in (None, TEMPLATE, MARKED):
        assert not any(encode_row({"messages": chat("u:hi")}, make_tokenizer(template), LONG).mask)


def test_template_that_rewrites_the_past_is_refused(make_tokenizer: Any) -> None:
    rewriting = TEMPLATE.replace("<bos>", "<bos>{{ messages | length }}")
    fails({"messages": chat("u:hi", "a:yo")}, make_tokenizer(rewriting), "message 1", "generation %} markers")


def test_token_across_the_border_is_refused(make_tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    assert shown(make_tokenizer(template), {"messages": chat("u:q", "a:r")}) == ("u:q;a:r;", "......r;")
    merging = make_tokenizer(template, merges=((":", "r"),))
    fails({"messages": chat("u:q", "a:r")}, merging, "message 1", "merges text across its border")


def test_template_errors_name_the_row(make_tokenizer: Any) -> None:
    strict = make_tokenizer("{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}x")
    fails({"messages": chat("s:no", "a:x")}, strict, "chat template refused", "user first")


def test_tool_calls_need_no_content_in_a_template(make_tokenizer: Any) -> None:
    template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] or m['tool_calls'][0] }}")
    call = {"role": "assistant", "content": None, "tool_calls": ["f()"]}
    row = {"messages": [*chat("u:hi"), call]}
    assert shown(make_tokenizer(template), row)[1].strip(".") == "f()<end>"
    fails(row, make_tokenizer(), "messages[1]['content'] must be a string, got null")


# --- truncation -----------------------------------------------------------------------------------------------------


def test_truncation_keeps_the_head(tokenizer: Any) -> None:
    row = {"prompt": "abc", "completion": "def"}
    assert shown(tokenizer, row, max_length=6) == ("<bos>abcde", "....de")
    assert encode_row(row, tokenizer, 6).truncated
    assert not encode_row(row, tokenizer, 8).truncated
    assert shown(tokenizer, row, max_length=3) == ("<bos>ab", "...")


def test_max_length_is_checked(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"max_length must be at least 2.*got 1"):
        RowFormatter(tokenizer, 1)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_unknown_layout_names_what_it_saw_and_what_it_takes(tokenizer: Any) -> None:
    fails(
        {"question": "q", "output": None},
        tokenizer,
        "fields seen: question, output (null)",
        "messages, prompt/completion, instruction/output/[input], text",
    )
    fails({}, tokenizer, "fields seen: none")


def test_layout_is_that_of_the_first_row(tokenizer: Any) -> None:
    formatter = RowFormatter(tokenizer, LONG)
    formatter.encode([("f:1", {"text": "x"})])
    with pytest.raises(
        ValueError, match=r"f:2: not the layout of the rows before it \(text\); fields seen: prompt, comp"
    ):
        formatter.encode([("f:2", {"prompt": "x", "completion": "y"})])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 3}, "field 'text' must be a string, got a value of type int"),
        ({"text": "\ud800"}, "field 'text' must be a string, got a string with unpaired surrogates"),
        ({"instruction": ["x"], "output": "y"}, "field 'instruction' must be a string, got a value of type list"),
        ({"instruction": "x", "output": 1.5}, "field 'output' must be a string, got a value of type float"),
        ({"instruction": "x", "input": {}, "output": "y"}, "field 'input' must be a string, got a value of type dict"),
        ({"prompt": 1, "completion": "y"}, "field 'prompt' must be a string or a message list, got a value of"),
        ({"prompt": "x", "completion": True}, "field 'completion' must be a string or a message list, got a value of"),
        ({"prompt": "x", "completion": [{}]}, "must be both strings or both message lists, got a string and a value"),
        ({"messages": "hi"}, "field 'messages' must be a list of messages, got a string"),
        ({"messages": []}, "field 'messages' is an empty list of messages"),
        ({"messages": ["hi"]}, "messages[0] must be an object with 'role' and 'content', got a string"),
        ({"messages": [{"content": "x"}]}, "messages[0]['role'] must be a string, got null"),
        ({"messages": [{"role": "user"}]}, "messages[0]['content'] must be a string, got null"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0]['content'] must be a string, got a value of"),
        (["x"], "a row must be an object with fields, got a value of type list"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "user", "content": "x"}]},
         "field 'completion' has no message with the role 'assistant'"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(tokenizer: Any, row: Any, message: str) -> None:
    fails(row, tokenizer, message)
