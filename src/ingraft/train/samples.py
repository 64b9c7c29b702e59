"""A few rows answered before and after training, because a number does not show what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ingraft.data import prompt_messages
from ingraft.data.examples import IGNORED, Example, as_chat
from ingraft.data.records import Labelled, Record
from ingraft.evaluate import generate, score_classes
from ingraft.evaluate.room import room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.evaluate.loss import Poll

LONGEST_PROMPT = 400
"""In tokens; a longer one fills the report without telling more."""
LONGEST_ANSWER = 96
NO_ROOM = "(no answer: the prompt takes all places of the base)"


def choose(examples: Sequence[Example], count: int = 3) -> list[Example]:
    """Rows to show: spread over the data, short enough to read, the first of their kind of answer where there are kinds."""
    fitting = [example for example in examples if len(example) <= LONGEST_PROMPT] or list(examples)
    spread = (
        [fitting[i * len(fitting) // (4 * count)] for i in range(4 * count)] if len(fitting) > 4 * count else fitting
    )
    found: list[Example] = []
    for wish in (True, False):  # first rows whose answers differ, then any
        for example in spread:
            seen = {_target(other) for other in found}
            if len(found) < count and example not in found and (not wish or _target(example) not in seen):
                found.append(example)
    return found


def questions(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, records: Sequence[Record] | None
) -> list[dict[str, str]]:
    """What each row asks and what answer it has, as a person wrote them.

    Args:
        records: what the examples were made of, by their `row_id`; None for plain text, whose examples are blocks of it.
    """
    found: list[dict[str, str]] = []
    for example in examples:
        record = records[example.row_id] if records is not None else None
        if example.label is not None and isinstance(record, Labelled):
            prompt, expected = f"{record.text}\n{record.text2 or ''}".strip(), record.label
        elif record is not None and (chat := as_chat(record)) is not None:
            asked = prompt_messages(chat.messages)
            prompt = "\n".join(message["content"] for message in asked if message["role"] != "system")
            expected = chat.messages[len(asked)]["content"] if len(asked) < len(chat.messages) else ""
        else:
            start, rest = _parts(example)
            prompt, expected = _text(start, tokenizer), _text(rest, tokenizer)
        found.append({"prompt": prompt, "expected": expected})
    return found


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    labels: Sequence[str] | None,
    pad_id: int,
    poll: Poll | None = None,
) -> list[str]:
    """What the model says to each row as it stands."""
    if labels is not None:
        scores = score_classes(model, examples, pad_id, poll=poll)
        return [
            f"{labels[prediction]} ({max(p):.0%})"
            for prediction, p in zip(scores.predictions, scores.probabilities, strict=True)
        ]
    prompts = [_parts(example)[0] for example in examples]
    longest = max(len(_parts(example)[1]) for example in examples)
    most = room(model)
    fitting = [prompt for prompt in prompts if len(prompt) < most]
    limit = min(LONGEST_ANSWER, max(16, 2 * longest))
    said = iter(generate(model, tokenizer, fitting, max_new_tokens=limit, poll=poll))
    return [next(said) if len(prompt) < most else NO_ROOM for prompt in prompts]


def _parts(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before the last learned stretch, and that stretch. Plain text is continued from its first third."""
    labels = example.labels
    if labels is None:
        return example.input_ids, []
    end = max((i for i, label in enumerate(labels) if label != IGNORED), default=len(labels) - 1) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    start = start or max(1, len(labels) // 3)
    return example.input_ids[:start], example.input_ids[start:end]


def _target(example: Example) -> tuple[int, ...]:
    return (example.label,) if example.label is not None else tuple(_parts(example)[1])


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip() if isinstance(text, str) else ""
