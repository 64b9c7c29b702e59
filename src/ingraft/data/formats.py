"""The recognised forms of rows, as data.

Each form is one frozen record: its name, the fields it needs and one function that reads them. Detection looks at all
rows and takes the most specific form that more than half of them have the fields for; a stray row is then a named
mistake and not a reason to read the whole file as something else. Fields that a form does not know are ignored,
because real files carry ids, sources and comments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ingraft.data.fields import (
    Format,
    Values,
    filled_in,
    kind_of,
    label_in,
    labels_in,
    list_in,
    number_in,
    text_in,
)
from ingraft.data.pixels import Picture, found
from ingraft.data.records import (
    Chat,
    Document,
    Judged,
    Labelled,
    Measured,
    Message,
    Multilabelled,
    Pictured,
    Preference,
    Ranking,
    Record,
    Related,
    Span,
    Tagged,
)
from ingraft.data.rows import Row, RowProblem, refuse
from ingraft.errors import IngraftError, nearest

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""Every spelling of a role met in public data, and the role that chat templates know it by."""

CALLS = ("tool_calls", "function_call")
"""Where a turn keeps what it asks of tools."""


def _turns(values: Values, name: str, role_key: str, text_key: str) -> tuple[Message, ...]:
    turns: list[Message] = []
    for number, turn in enumerate(list_in(values, name), 1):
        where = f"turn {number} of '{name}'"
        if not isinstance(turn, Mapping):
            raise RowProblem(f"{where} is {kind_of(turn)}, not an object with '{role_key}' and '{text_key}'")
        turn = cast("Values", turn)
        if call := next((key for key in CALLS if turn.get(key)), None):
            raise RowProblem(
                f"{where} calls a tool ('{call}'), which is not learned yet; without its call it would teach something else"
            )
        for key in (role_key, text_key):
            if turn.get(key) is None:
                raise RowProblem(f"{where} has no '{key}'")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise RowProblem(
                f"{where} has the role {turn[role_key]!r}{nearest(str(turn[role_key]), ROLES)}; known: {', '.join(ROLES)}"
            )
        try:
            content = text_in(turn, text_key)
        except RowProblem as problem:
            raise RowProblem(f"{where}: {problem}") from None
        if role == "assistant" and not content.strip():
            raise RowProblem(f"{where}, the assistant's, is empty, and would teach to say nothing")
        turns.append({"role": role, "content": content})
    if not turns:
        raise RowProblem(f"field '{name}' is an empty list")
    return tuple(turns)


def _answered(turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowProblem(f"no turn of '{name}' is the assistant's, so there is nothing to learn")
    return turns


def _prompt(values: Values, name: str = "prompt") -> tuple[Message, ...]:
    if isinstance(values[name], str):
        return ({"role": "user", "content": filled_in(values, name)},)
    return _turns(values, name, "role", "content")


def _answer(values: Values, name: str) -> str:
    if isinstance(values[name], str):
        return filled_in(values, name)
    turns = _turns(values, name, "role", "content")
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise RowProblem(f"field '{name}' must be a text or one turn of the assistant")
    return turns[0]["content"]


def _system(values: Values) -> tuple[Message, ...]:
    if values.get("system") is None or not (text := text_in(values, "system")).strip():
        return ()
    return (Message(role="system", content=text),)


def _read_instruction(values: Values) -> Chat:
    question = filled_in(values, "instruction")
    if values.get("input") is not None and (extra := text_in(values, "input")).strip():
        question = f"{question}\n\n{extra}"
    asked, answer = (
        Message(role="user", content=question),
        Message(role="assistant", content=filled_in(values, "output")),
    )
    return Chat(messages=(*_system(values), asked, answer))


def _read_messages(values: Values) -> Chat:
    return Chat(messages=_answered(_turns(values, "messages", "role", "content"), "messages"))


def _read_conversations(values: Values) -> Chat:
    turns = _answered(_turns(values, "conversations", "from", "value"), "conversations")
    return Chat(messages=turns if turns[0]["role"] == "system" else (*_system(values), *turns))


def _read_completion(values: Values) -> Chat:
    answer: Message = {"role": "assistant", "content": _answer(values, "completion")}
    return Chat(messages=(*_prompt(values), answer), plain=isinstance(values["prompt"], str))


def _read_labelled(values: Values) -> Labelled:
    return Labelled(text=filled_in(values, "text"), text2=None, label=label_in(values))


def _read_image(values: Values) -> Pictured:
    return Pictured(image=Picture(name=filled_in(values, "image")), label=label_in(values))


def _read_image_file(values: Values) -> Pictured:
    return Pictured(image=Picture(name=filled_in(values, "file")), label=label_in(values))


def _find_image(record: Pictured, row: Row) -> Pictured:
    """Names of pictures are seen from where the row's own file is; in a folder of pictures, from there."""
    place = Path(row.file).expanduser()
    return Pictured(image=found(record.image.name, place if place.is_dir() else place.parent), label=record.label)


def _read_pair(values: Values) -> Labelled:
    return Labelled(text=filled_in(values, "text"), text2=filled_in(values, "text2"), label=label_in(values))


def _texts(values: Values) -> dict[str, Any]:
    return {"text": filled_in(values, "text"), "text2": filled_in(values, "text2") if "text2" in values else None}


def _read_number(values: Values) -> Measured:
    return Measured(**_texts(values), value=number_in(values))


def _read_labels(values: Values) -> Multilabelled:
    return Multilabelled(**_texts(values), labels=labels_in(values))


def _read_related(values: Values) -> Related:
    found = values.get("negative")
    others = [found] if isinstance(found, str) else list_in(values, "negative") if found is not None else []
    texts = [filled_in({"negative": text}, "negative") for text in others]
    return Related(text=filled_in(values, "query"), match=filled_in(values, "positive"), others=tuple(texts))


def _read_similar(values: Values) -> Related:
    return Related(text=filled_in(values, "text"), match=filled_in(values, "text2"), value=number_in(values))


def _read_answer_as_match(values: Values) -> Related:
    question = "\n\n".join(message["content"] for message in _prompt(values))
    return Related(text=question, match=_answer(values, "completion"))


def _read_text(values: Values) -> Document:
    return Document(text=text_in(values, "text"))


def _read_line(values: Values) -> Document:
    return Document(text=text_in(values, "text"), line_of_file=True)


def _read_preference(values: Values) -> Preference:
    return Preference(messages=_prompt(values), chosen=_answer(values, "chosen"), rejected=_answer(values, "rejected"))


def _read_chat_preference(values: Values) -> Preference:
    turns = _turns(values, "messages", "role", "content")
    if turns[-1]["role"] == "assistant":
        raise RowProblem("the last turn of 'messages' is the assistant's; they end with the turn that is answered")
    return Preference(messages=turns, chosen=_answer(values, "chosen"), rejected=_answer(values, "rejected"))


def _read_ranking(values: Values) -> Ranking:
    names = [(f"responses[{number}]", answer) for number, answer in enumerate(list_in(values, "responses"), 1)]
    answers = tuple(_answer({name: answer}, name) for name, answer in names)
    places = list_in(values, "ranking")
    if len(places) != len(answers):
        raise RowProblem(f"{len(answers)} responses but {len(places)} places in 'ranking'")
    if wrong := [place for place in places if isinstance(place, bool) or not isinstance(place, int) or place < 1]:
        raise RowProblem(
            f"field 'ranking' holds {wrong[0]!r}: it gives the place of each response in turn, whole numbers from 1, the best, upwards"
        )
    if len(set(places)) < 2:
        raise RowProblem("field 'ranking' gives all responses one place, so there is nothing to prefer")
    order = {place: number for number, place in enumerate(sorted(set(places)), 1)}
    return Ranking(messages=_prompt(values), answers=answers, places=tuple(order[place] for place in places))


def _read_judged(values: Values) -> Judged:
    good = values["label"]
    if good not in (True, False):
        raise RowProblem(
            f"field 'label' of a judged answer must be true or false, not {good!r}; "
            "if it is only a remark, say `--data.format prompt-completion`"
        )
    return Judged(messages=_prompt(values), completion=_answer(values, "completion"), good=bool(good))


def _read_tagged(values: Values) -> Tagged:
    tokens, tags = list_in(values, "tokens"), list_in(values, "tags")
    if len(tokens) != len(tags):
        raise RowProblem(f"{len(tokens)} tokens but {len(tags)} tags")
    if not tokens:
        raise RowProblem("field 'tokens' is an empty list")
    words = tuple(text_in({"tokens": token}, "tokens") for token in tokens)
    if empty := next((number for number, word in enumerate(words, 1) if not word.strip()), 0):
        raise RowProblem(f"token {empty} of 'tokens' is empty")
    return Tagged(tokens=words, tags=tuple(label_in({"tags": tag}, "tags") for tag in tags))


def _read_span(values: Values) -> Span:
    context, found = filled_in(values, "context"), values["answers"]
    if isinstance(found, Mapping):  # the `datasets` library stores the answers as two parallel lists
        columns = cast("Values", found)
        texts, starts = columns.get("text"), columns.get("answer_start")
        if (
            not isinstance(texts, list)
            or not isinstance(starts, list)
            or len(cast("list[Any]", texts)) != len(cast("list[Any]", starts))
        ):
            raise RowProblem("field 'answers' needs the lists 'text' and 'answer_start', equally long")
        found = [
            {"text": t, "answer_start": s}
            for t, s in zip(cast("list[Any]", texts), cast("list[Any]", starts), strict=True)
        ]
    answers: list[tuple[str, int]] = []
    for number, answer in enumerate(list_in({"answers": found}, "answers"), 1):
        if not isinstance(answer, Mapping) or not {"text", "answer_start"} <= set(cast("Values", answer)):
            raise RowProblem(f"answer {number} needs 'text' and 'answer_start'")
        answer = cast("Values", answer)
        text, start = text_in(answer, "text"), answer["answer_start"]
        if not text.strip():
            raise RowProblem(f"answer {number} is empty")
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            raise RowProblem(f"answer {number} ({text[:40]!r}) does not stand at character {start} of the context")
        answers.append((text, start))
    return Span(context=context, question=filled_in(values, "question"), answers=tuple(answers))


FORMATS: dict[str, Format] = {
    record.name: record
    for record in (
        Format(
            name="messages-preference",
            fields=("messages", "chosen", "rejected"),
            read=_read_chat_preference,
            meaning=Preference,
        ),
        Format(name="preference", fields=("prompt", "chosen", "rejected"), read=_read_preference, meaning=Preference),
        Format(name="ranking", fields=("prompt", "responses", "ranking"), read=_read_ranking, meaning=Ranking),
        Format(name="span", fields=("context", "question", "answers"), read=_read_span, meaning=Span),
        Format(name="pair-label", fields=("text", "text2", "label"), read=_read_pair, meaning=Labelled),
        Format(name="instruction", fields=("instruction", "output"), read=_read_instruction, meaning=Chat),
        Format(name="triplet", fields=("query", "positive", "negative"), read=_read_related, meaning=Related),
        Format(name="match", fields=("query", "positive"), read=_read_related, meaning=Related),
        Format(name="tags", fields=("tokens", "tags"), read=_read_tagged, meaning=Tagged),
        Format(name="judged", fields=("prompt", "completion", "label"), read=_read_judged, meaning=Judged),
        Format(name="prompt-completion", fields=("prompt", "completion"), read=_read_completion, meaning=Chat),
        Format(name="text-label", fields=("text", "label"), read=_read_labelled, meaning=Labelled),
        Format(name="image-label", fields=("image", "label"), read=_read_image, meaning=Pictured, opens=_find_image),
        Format(name="file-label", fields=("file", "label"), read=_read_image_file, meaning=Pictured, opens=_find_image),
        Format(name="messages", fields=("messages",), read=_read_messages, meaning=Chat),
        Format(name="conversations", fields=("conversations",), read=_read_conversations, meaning=Chat),
        Format(name="lines", fields=("text",), read=_read_line, meaning=Document, detected=False),
        Format(name="text", fields=("text",), read=_read_text, meaning=Document),
        Format(
            name="pair-number", fields=("text", "text2", "label"), read=_read_number, meaning=Measured, detected=False
        ),
        Format(name="text-number", fields=("text", "label"), read=_read_number, meaning=Measured, detected=False),
        Format(
            name="pair-similarity",
            fields=("text", "text2", "label"),
            read=_read_similar,
            meaning=Related,
            detected=False,
        ),
        Format(
            name="completion-match",
            fields=("prompt", "completion"),
            read=_read_answer_as_match,
            meaning=Related,
            detected=False,
        ),
        Format(
            name="pair-labels",
            fields=("text", "text2", "label"),
            read=_read_labels,
            meaning=Multilabelled,
            detected=False,
        ),
        Format(name="text-labels", fields=("text", "label"), read=_read_labels, meaning=Multilabelled, detected=False),
    )
}
"""Most specific first: detection takes the first form that fits."""

FIELDS = frozenset(name for record in FORMATS.values() for name in record.fields)
"""Every field name that makes a row recognisable."""


def missing(values: Values, form: Format) -> list[str]:
    """The fields of `form` that `values` lacks. A null is no value, and neither is an empty label of a table."""
    return [name for name in form.fields if values.get(name) is None or (name == "label" and values[name] == "")]


def known_forms() -> str:
    """The recognised forms in one line, for messages."""
    return "; ".join("{" + ", ".join(form.fields) + "}" for form in FORMATS.values() if form.detected)


def detect(rows: Sequence[Row]) -> str:
    """The name of the form these rows have, judged by all of them.

    Raises:
        IngraftError: there are no rows, or their fields make no recognised form; names the fields that were found.
    """
    if not rows:
        raise IngraftError("There are no rows to look at.")
    if all(row.reader == "txt" for row in rows):
        return "lines"
    fitting = Counter(
        name for row in rows for name, form in FORMATS.items() if form.detected and not missing(row.values, form)
    )
    for name in FORMATS:
        if fitting[name] * 2 > len(rows):
            return name
    if fitting:
        return fitting.most_common(1)[0][0]
    found = Counter(name for row in rows for name in row.values)
    hints = _partly(found) + "".join(
        f" '{name}'{hint}."
        for name in list(found)[:8]
        if name not in FIELDS and (hint := nearest(name, FIELDS, count=1))
    )
    raise IngraftError(
        f"{rows[0].file}: no row has a form that Ingraft recognises. Fields found: {', '.join(list(found)[:20]) or 'none'}.{hints}",
        f"Recognised forms: {known_forms()}; plain text. Rename the fields to one of them; a question and its answer are {{prompt, completion}}.",
    )


def _fields(names: Sequence[str]) -> str:
    return f"field {names[0]!r} is" if len(names) == 1 else f"fields {' and '.join(map(repr, names))} are"


def _other_form(row: Row, chosen: Format) -> str:
    """What else the row could be."""
    fits = (form.name for form in FORMATS.values() if form.detected and not missing(row.values, form))
    other = next((name for name in fits if name != chosen.name), None)
    if other is None:
        return ""
    return f"; as it is, it is of form {other}: rows of another form belong in a file of their own (--data FILE --data FILE)"


def _partly(found: Mapping[str, int]) -> str:
    """The form of which most is there, and what it lacks; nothing where no field is known."""
    known = [name for name in found if name in FIELDS]
    if not known:
        return ""
    form = min(FORMATS.values(), key=lambda form: (-len(set(known) & set(form.fields)), len(form.fields)))
    there, lacking = ([repr(name) for name in form.fields if (name in found) is here] for here in (True, False))
    if not lacking:  # it is there in name, but not in enough rows
        return ""
    return f" {' and '.join(there)} would be of {{{', '.join(form.fields)}}}, which needs {' and '.join(lacking)} too."


def read_records(
    rows: Sequence[Row], form: str = "auto", reads: Mapping[str, str] | None = None
) -> tuple[Format, list[Record]]:
    """The meaning of every row.

    Args:
        rows: rows of one or several files.
        form: a name of `FORMATS`, or `auto` to detect it.
        reads: forms that are to be read as others of the same fields, whose labels mean something else.

    Returns:
        the form, and one record per row, in order.

    Raises:
        IngraftError: an unknown form, or rows that it cannot use, each by file and line.
    """
    if form != "auto" and form not in FORMATS:
        raise IngraftError(
            f"There is no data format '{form}'{nearest(form, FORMATS)}. Known: auto, {', '.join(FORMATS)}."
        )
    name = detect(rows) if form == "auto" else form
    chosen = FORMATS[(reads or {}).get(name, name)]
    records: list[Record] = []
    problems: list[str] = []
    for row in rows:
        lacking = missing(row.values, chosen)
        try:
            if lacking:
                others = [name for name in row.values if name not in chosen.fields]
                hint = next((f"; it has '{name}'" for name in others if nearest(name, lacking, count=1)), "")
                raise RowProblem(f"{_fields(lacking)} missing{hint or _other_form(row, chosen)}")
            record = chosen.read(row.values)
            records.append(record if chosen.opens is None else chosen.opens(record, row))
        except RowProblem as problem:
            problems.append(f"{row.place}: {problem}")
    if problems:
        fields = ", ".join(chosen.fields)
        why = "as asked for" if form != "auto" else "as detected; --data.format names another"
        refuse(
            problems,
            summary=f"{len(problems)} of {len(rows)} rows cannot be used as {chosen.name} rows {{{fields}}} ({why}):",
        )
    return chosen, records
