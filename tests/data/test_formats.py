"""Every documented form is recognised by its fields, read to its meaning, and complained about by file, line and field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ingraft.data.formats import FORMATS, detect, read_records
from ingraft.data.records import Chat, Document, Judged, Labelled, Preference, Ranking, Related, Span, Tagged
from ingraft.errors import IngraftError

USER, BOT, SYSTEM = (
    {"role": role, "content": word} for role, word in (("user", "Q"), ("assistant", "A"), ("system", "S"))
)
ANSWER = {"text": "bc", "answer_start": 1}
SAMPLES = [
    ("instruction", {"instruction": "Q", "input": "", "output": "A"}, Chat(messages=(USER, BOT))),
    ("instruction", {"instruction": "Q", "input": "more", "output": "A"}, Chat(messages=({"role": "user", "content": "Q\n\nmore"}, BOT))),
    ("instruction", {"instruction": "Q", "output": "A", "system": "S"}, Chat(messages=(SYSTEM, USER, BOT))),
    ("messages", {"messages": [SYSTEM, USER, BOT]}, Chat(messages=(SYSTEM, USER, BOT))),
    ("messages", {"messages": [USER | {"tool_calls": None}, BOT | {"tool_calls": []}]}, Chat(messages=(USER, BOT))),
    ("conversations", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, Chat(messages=(USER, BOT))),
    ("conversations", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"}, Chat(messages=(SYSTEM, USER, BOT))),
    ("prompt-completion", {"prompt": "Q", "completion": "A"}, Chat(messages=(USER, BOT), plain=True)),
    ("prompt-completion", {"prompt": [SYSTEM, USER], "completion": [BOT]}, Chat(messages=(SYSTEM, USER, BOT))),
    ("judged", {"prompt": "Q", "completion": "A", "label": True}, Judged(messages=(USER,), completion="A", good=True)),
    ("preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}, Preference(messages=(USER,), chosen="A", rejected="B")),
    ("messages-preference", {"prompt": "x", "messages": [USER], "chosen": "A", "rejected": "B"}, Preference(messages=(USER,), chosen="A", rejected="B")),
    ("ranking", {"prompt": "Q", "responses": ["A", "B", "C"], "ranking": [4, 1, 4]}, Ranking(messages=(USER,), answers=("A", "B", "C"), places=(2, 1, 2))),
    ("triplet", {"query": "Q", "positive": "A", "negative": ["B", "C"]}, Related(text="Q", match="A", others=("B", "C"))),
    ("match", {"query": "Q", "positive": "A"}, Related(text="Q", match="A", others=())),
    ("text-label", {"text": "T", "label": 1}, Labelled(text="T", text2=None, label="1")),
    ("text-label", {"text": "T", "label": 2.0}, Labelled(text="T", text2=None, label="2")),
    ("text-label", {"text": "T", "label": False}, Labelled(text="T", text2=None, label="false")),
    ("pair-label", {"text": "T", "text2": "U", "label": "no"}, Labelled(text="T", text2="U", label="no")),
    ("text", {"text": "T"}, Document(text="T")),
    ("tags", {"tokens": ["a", "b"], "tags": ["O", "B-X"]}, Tagged(tokens=("a", "b"), tags=("O", "B-X"))),
    ("span", {"context": "abcd", "question": "Q", "answers": [ANSWER]}, Span(context="abcd", question="Q", answers=(("bc", 1),))),
    ("span", {"context": "abcd", "question": "Q", "answers": {"text": ["bc"], "answer_start": [1]}}, Span(context="abcd", question="Q", answers=(("bc", 1),))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "record"), SAMPLES)
def test_each_form_is_recognised_and_read(
    name: str, values: dict[str, Any], record: Any, make_rows: Callable[..., Any]
) -> None:
    rows = make_rows(values | {"id": 7, "comment": "ignored"})
    assert detect(rows) == name
    form, records = read_records(rows)
    assert (form.name, records) == (name, [record])
    assert isinstance(record, form.meaning)


def test_every_form_of_the_registry_is_tried_above() -> None:
    """But for those that name files, which are tried in test_pictures.py."""
    forms = {name for name, form in FORMATS.items() if form.detected and form.opens is None}
    assert {name for name, _, _ in SAMPLES} == forms


def test_lines_of_a_text_file(make_rows: Callable[..., Any]) -> None:
    assert read_records(make_rows({"text": "one"}, reader="txt"))[1] == [Document(text="one", line_of_file=True)]


def test_one_incomplete_row_is_a_mistake_and_not_another_form(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(
        *[{"text": "a", "label": 1}] * 4, {"text": "b"}, {"text": "c", "label": None}, {"text": "d", "label": ""}
    )
    with pytest.raises(IngraftError) as caught:
        read_records(rows)
    assert caught.value.problems[0].startswith("3 of 7 rows cannot be used as text-label rows {text, label}")
    assert [p.split(": ")[0] for p in caught.value.problems[1:]] == ["rows.jsonl:5", "rows.jsonl:6", "rows.jsonl:7"]
    assert all("'label' is missing" in problem for problem in caught.value.problems[1:])


def test_a_misspelt_field_is_pointed_at(make_rows: Callable[..., Any]) -> None:
    with pytest.raises(IngraftError, match=r"Fields found: instructions, response.*instruction"):
        read_records(make_rows({"instructions": "Q", "response": "A"}))
    with pytest.raises(IngraftError, match=r"rows.jsonl:3: field 'output' is missing; it has 'outputs'"):
        read_records(make_rows(*[{"instruction": "Q", "output": "A"}] * 2, {"instruction": "Q", "outputs": "A"}))


def test_a_known_field_is_not_corrected_to_itself(make_rows: Callable[..., Any]) -> None:
    with pytest.raises(IngraftError) as caught:
        read_records(make_rows({"question": "Q", "answer": "A"}))
    said = " ".join(caught.value.problems)
    assert "'question' would be of {context, question, answers}, which needs 'context' and 'answers' too." in said
    assert "a question and its answer are {prompt, completion}" in said
    assert "'question' (did you mean 'question'?)" not in said


def test_an_asked_for_form_is_kept(make_rows: Callable[..., Any]) -> None:
    rows = make_rows({"prompt": "Q", "completion": "A", "label": "remark"})
    with pytest.raises(IngraftError, match="must be true or false"):
        read_records(rows)
    assert read_records(rows, "prompt-completion")[0].name == "prompt-completion"
    with pytest.raises(IngraftError, match=r"no data format 'instructions'.*did you mean 'instruction'"):
        read_records(rows, "instructions")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": 3, "label": 1}, "'text' is a number, not a text"),
        ({"text": " ", "label": 1}, "'text' is empty"),
        ({"text": "a", "label": 0.5}, "--task regress"),
        ({"text": "a", "label": ["x"]}, "'label' is a list"),
        ({"text": "\ud800", "label": 1}, "surrogate"),
        ({"instruction": "Q", "output": ""}, "'output' is empty"),
        ({"messages": []}, "empty list"),
        ({"messages": [USER]}, "nothing to learn"),
        ({"messages": "Q"}, "is a text, not a list"),
        ({"messages": [{"role": "user"}]}, "turn 1 of 'messages' has no 'content'"),
        ({"messages": [{"role": "asistant", "content": "A"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 of 'messages': field 'content' is a list"),
        ({"messages": ["Q"]}, "turn 1 of 'messages' is a text, not an object"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "turn 2 of 'messages', the assistant's, is empty"),
        ({"messages": [USER, BOT, USER, {"role": "bot", "content": " \n"}]}, "turn 4 of 'messages', the assistant's, is empty"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, USER, BOT]}, "turn 2 of 'messages' calls a tool"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, USER, BOT]}, "turn 2 of 'messages' calls a tool"),
        ({"messages": [USER, BOT | {"function_call": {"name": "f"}}]}, "turn 2 of 'messages' calls a tool"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": ""}]}, "turn 2 of 'conversations', the assistant's, is empty"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": " "}]}, "turn 1 of 'completion', the assistant's, is empty"),
        ({"tokens": ["a"], "tags": []}, "1 tokens but 0 tags"),
        ({"context": "abcd", "question": "Q", "answers": [{"text": "x", "answer_start": 0}]}, "does not stand at character 0"),
        ({"prompt": "Q", "chosen": [USER], "rejected": "B"}, "one turn of the assistant"),
        ({"messages": [USER, BOT], "chosen": "A", "rejected": "B"}, "the last turn of 'messages' is the assistant's"),
        ({"prompt": "Q", "responses": ["A", "B"], "ranking": [1]}, "2 responses but 1 places"),
        ({"prompt": "Q", "responses": ["A", "B"], "ranking": [0, 1]}, "'ranking' holds 0"),
        ({"prompt": "Q", "responses": ["A", "B"], "ranking": [True, 2]}, "'ranking' holds True"),
        ({"prompt": "Q", "responses": ["A", "B"], "ranking": [2, 2]}, "one place"),
        ({"prompt": "Q", "responses": ["A", ""], "ranking": [1, 2]}, r"field 'responses\[2\]' is empty"),
    ],
)  # fmt: skip
def test_unusable_values_are_named(values: dict[str, Any], message: str, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(IngraftError, match=rf"rows\.jsonl:1: .*{message}"):
        read_records(make_rows(values))
