"""Questions for an encoder and answers for the decoder behind it, each with the tokenizer's own special tokens.

The question is what a conversation says ahead of its last answer, turn after turn and without names of roles: encoder-decoders have no chat templates.
Questions and answers have `max_length` tokens each. A question that is longer is cut by the tokenizer, which keeps the tokens that begin and end it. Of
an answer the end is cut away, the token for the end with it: nobody should learn to stop there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ingraft.data.chat import prompt_messages
from ingraft.data.cutting import cutting
from ingraft.data.examples import Example, Tally, count_unknown
from ingraft.data.records import Chat
from ingraft.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def question_and_answer(chat: Chat) -> tuple[str, str]:
    """What is asked and the last answer; the answer is empty where there is none."""
    asked = prompt_messages(chat.messages)
    answer = chat.messages[len(asked)]["content"] if len(asked) < len(chat.messages) else ""
    return "\n\n".join(message["content"] for message in asked), answer


def encode_pairs(
    records: Sequence[Chat | None],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str = "keep_start",
    *,
    tally: Tally,
) -> list[Example]:
    """Each row as one example: `input_ids` for the encoder, `target` for the decoder.

    Args:
        records: conversations with an answer; `rows` are their places.
        max_length: most tokens of a question, and of an answer.
    """
    chats = [chat for chat in records if chat is not None]
    if not chats:
        return []
    pairs = [question_and_answer(chat) for chat in chats]
    questions, answers = ([pair[i] for pair in pairs] for i in (0, 1))
    asked = cast("list[list[int]]", tokenizer(questions, verbose=False)["input_ids"])
    with cutting(tokenizer, truncation):
        made = tokenizer(questions, truncation=True, max_length=max_length, verbose=False)
    short = cast("list[list[int]]", made["input_ids"])
    given = cast("list[list[int]]", tokenizer(text_target=answers, verbose=False)["input_ids"])
    special = tokenizer.num_special_tokens_to_add(pair=False)
    count_unknown([*questions, *answers], [*asked, *given], tokenizer, tally)
    tally.tokens -= 2 * len(chats) * special  # they are no part of the texts
    examples: list[Example] = []
    for number, chat in enumerate(chats):
        target = given[number]
        if tokenizer.eos_token_id is not None and target[-1:] != [tokenizer.eos_token_id]:
            target = [*target, cast("int", tokenizer.eos_token_id)]
        tally.lengths.append(len(asked[number]) + len(target))
        if len(short[number]) < len(asked[number]) or len(target) > max_length:
            tally.shortened.append(number)
        if len(target) > max_length:
            tally.lost.append(rows[number].place)
        answered = sum(message["role"] == "assistant" for message in chat.messages)
        tally.more["earlier answers of conversations, which are read and not learned"] += answered - 1
        examples.append(Example(input_ids=short[number], target=target[:max_length], row_id=number))
    return examples
