"""Rows that ask and may say what the answer is: what a policy samples its own answers to.

Nothing of such a row is learned as it stands. Its prompt is rendered as for whoever generates; the answer, where the row has one, is kept aside for a
function that compares (`expected`). A prompt is never cut: one that is longer than `max_length` asks something else afterwards, so its row is dropped and
counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ingraft.data.chat import encode_prompt, has_template, prompt_messages
from ingraft.data.examples import Example, Tally, as_chat, count_unknown
from ingraft.data.records import Chat, Judged, Labelled, Preference, Ranking
from ingraft.data.rows import Row, RowProblem, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.data.records import Message, Record

UNSAID = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands where a row has no answer, while it is read."""

_ANSWERS = {"instruction": "output", "prompt": "completion"}
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}


def with_answer(row: Row, labels: Sequence[str]) -> Mapping[str, Any]:
    """The row's fields, with `UNSAID` where it lacks an answer."""
    del labels
    values = dict(row.values)
    if "chosen" in values or "responses" in values:
        return values
    for name, answer in _ANSWERS.items():
        if name in values and values.get(answer) in (None, ""):
            values[answer] = UNSAID
    for name, (role, text) in _TURNS.items():
        turns = values.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            said = str(cast("dict[str, Any]", turns[-1]).get(role)).lower()
            if said in ("user", "human"):
                values[name] = [*cast("list[Any]", turns), {role: "assistant", text: UNSAID}]
    return values


def asked(record: Record) -> tuple[Message, ...]:
    """The turns before the answer."""
    if isinstance(record, Preference | Ranking | Judged):
        return record.messages
    chat = as_chat(record)
    assert chat is not None
    return tuple(prompt_messages(chat.messages))


def expected(record: Record) -> str | None:
    """The answer that the row has: what it says, its label, or the better of several; None where it has none."""
    found: str | None = None
    if isinstance(record, Preference):
        found = record.chosen
    elif isinstance(record, Labelled):
        found = record.label
    elif isinstance(record, Chat):
        before = prompt_messages(record.messages)
        found = record.messages[len(before)]["content"] if len(before) < len(record.messages) else None
    return None if found == UNSAID else found


def prompt_text(record: Record) -> str:
    """What is asked, for people and for functions that judge: the turns but those of the system."""
    return "\n".join(turn["content"] for turn in asked(record) if turn["role"] != "system")


def encode_prompts(
    records: Sequence[Record],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    tally: Tally | None = None,
) -> list[Example]:
    """The tokens after which the model is to answer, one example a row whose prompt is short enough.

    Raises:
        IngraftError: a template refuses rows; no row is left.
    """
    tally = Tally() if tally is None else tally
    examples: list[Example] = []
    problems: list[str] = []
    for number, (record, row) in enumerate(zip(records, rows, strict=True)):
        try:
            ids = prompt_tokens(record, tokenizer)
        except RowProblem as problem:
            problems.append(f"{row.place}: {problem}")
            continue
        tally.lengths.append(len(ids))
        count_unknown([prompt_text(record)], [ids], tokenizer, tally)
        if len(ids) > max_length:
            tally.dropped.append(row.place)
            continue
        examples.append(Example(input_ids=ids, row_id=number))
    if problems or not examples:
        longest = f"no prompt is as short as {max_length} tokens; raise data.max_length"
        refuse(
            problems or [f"{rows[0].file}: {longest}"], summary=f"{len(problems) or len(rows)} rows cannot be asked."
        )
    return examples


def prompt_tokens(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which a model answers this row.

    Raises:
        RowProblem: the template refuses it.
    """
    turns, plain = asked(record), isinstance(record, Chat) and record.plain
    if plain and not has_template(tokenizer):
        return cast("list[int]", tokenizer.encode(turns[0]["content"], verbose=False))
    return encode_prompt(turns, tokenizer)
