"""Conversations as text: the tokenizer's own template, and which stretches of it a model learns.

A template is a program that came with a download, so it only ever runs in transformers' sandboxed environment, and
whatever it raises becomes a message about the template. A base without one gets the fixed template below.

Which part of the rendered text is the answer cannot be read off the template, and the special markers for
it (`{% generation %}`) are rare in practice. What every usable template does have is a generation prompt: the text after
which the model is to speak. So the answer of a turn begins where the conversation up to that turn, rendered with its
generation prompt, ends, and it ends after the turn's own words and the end-of-turn token that follows them. Both are
checked against the text of the whole conversation. A template that rewrites its past in a way that breaks this is
refused by name; guessing would train on the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ingraft.data.records import Chat, Message
from ingraft.data.rows import RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.bases.reading import Reader

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Assistant:\n' + message['content'] + eos_token + '\n\n' }}
{%- else -%}
{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] + '\n\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Assistant:\n' }}
{%- endif -%}"""
"""For bases that have no template: plain headings, and the base's own end token after every answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of the rendered text that is learned as a whole or not at all."""

    text: str
    learned: bool


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer came with a chat template of its own."""
    return bool(tokenizer.chat_template)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer itself puts its begin token before a text. Many own one and never use it."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and isinstance(ids, list) and ids[:1] == [tokenizer.bos_token_id]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that conversations are rendered with: the tokenizer's own, else the fixed default."""
    if has_template(tokenizer):
        return str(tokenizer.get_chat_template())
    return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + DEFAULT_TEMPLATE


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, answer_next: bool = False) -> str:
    """The conversation as the text that the model reads, special tokens spelled out.

    Args:
        messages: the turns.
        tokenizer: its template is used, or the default one.
        answer_next: end with the generation prompt, after which the assistant is to speak.

    Raises:
        RowProblem: the template refuses this conversation; carries the template's own words.
    """
    turns: list[dict[str, Any]] = [{"role": m["role"], "content": m["content"]} for m in messages]
    template = template_of(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            turns,
            chat_template=template,
            add_generation_prompt=answer_next,
            tokenize=False,
            eos_token=end_token(tokenizer),
        )
    except Exception as error:  # the template is a foreign program: it may raise anything
        raise RowProblem(f"the chat template of {name_of(tokenizer)} refuses this conversation: {error}") from error
    if not isinstance(text, str):
        raise RowProblem(f"the chat template of {name_of(tokenizer)} did not give one text")
    return text


def name_of(tokenizer: Reader) -> str:
    """What to call this tokenizer, or image processor, in a message."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the tokenizer's end token; empty where it has none."""
    return str(tokenizer.eos_token) if tokenizer.eos_token is not None else ""


def prompt_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation up to, and without, the assistant's last turn: what the model is given before it answers."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    return tuple(messages[:last])


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which the model answers, exactly as they stand before a learned answer in `encode_sft`."""
    text = render(messages, tokenizer, answer_next=True)
    # A warning about the length says nothing here: whoever generates knows the base's room.
    return cast("list[int]", tokenizer.encode(text, add_special_tokens=False, verbose=False))


def segments(
    record: Chat, tokenizer: PreTrainedTokenizerBase, *, learn: str = "answer", chat: bool = True
) -> list[Segment]:
    """The record as consecutive stretches of text, learned and not, that join to the whole rendering.

    Args:
        record: the conversation.
        tokenizer: gives the template and the end token.
        learn: `answer` for the assistant's turns with their end-of-turn token, `all` for every token.
        chat: False reads a bare prompt and completion as they stand, joined without a template.

    Raises:
        RowProblem: the template refuses the conversation, or does not show where the answers are.
    """
    end = end_token(tokenizer)
    if record.plain and not chat:
        begin = tokenizer.bos_token if begins_with_bos(tokenizer) else ""
        parts = [Segment(text=f"{begin}{record.messages[0]['content']}", learned=False)]
        parts.append(Segment(text=record.messages[-1]["content"] + end, learned=True))
    elif learn == "all":
        parts = [Segment(text=_ended(render(record.messages, tokenizer), tokenizer), learned=True)]
    else:
        parts = _mark_answers(record.messages, tokenizer)
    if learn == "all":
        return [Segment(text="".join(part.text for part in parts), learned=True)]
    return parts


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with the end token behind it, where no special token ends it: without one nothing teaches to stop."""
    return text if text.rstrip().endswith(tuple(_stop_texts(tokenizer))) else text + end_token(tokenizer)


def _mark_answers(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    whole = render(messages, tokenizer)
    stops = _stop_texts(tokenizer)
    parts: list[Segment] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:  # a greeting that nobody asked for is read, not learned
            continue
        span = _answer_span(messages, index, whole, tokenizer, stops)
        if span is None or span[0] < done:
            raise RowProblem(
                f"the chat template of {name_of(tokenizer)} does not show where turn {index + 1}, the assistant's, begins "
                "and ends (it rewrites earlier turns, or the answer's words); use single-turn rows, give the tokenizer "
                "another `chat_template`, or learn every token with `--data.learn all`"
            )
        start, stop = span
        rest = whole[stop:].lstrip()
        end = next((text for text in stops if rest.startswith(text)), "")
        if end:
            stop = len(whole) - len(rest) + len(end)
        parts.append(Segment(text=whole[done:start], learned=False))
        parts.append(Segment(text=whole[start:stop], learned=True))
        done = stop
        if not end and index == len(messages) - 1:  # the template leaves the end token to the caller
            parts[-1] = Segment(text=_ended(whole[start:stop], tokenizer), learned=True)
            done = len(whole)
    parts.append(Segment(text=whole[done:], learned=False))
    return [part for part in parts if part.text]


def _stop_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens by length, longest first: an end-of-turn token is often not the tokenizer's eos (`<|eot_id|>`,
    `<end_of_turn>`).
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens), key=lambda text: (-len(text), text))


def _answer_span(
    messages: Sequence[Message], index: int, whole: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]
) -> tuple[int, int] | None:
    """Where turn `index` begins in `whole`, with what the template itself puts before the words, and where its words
    end; None where the template does not show it.
    """
    words = messages[index]["content"].strip()
    asked = render(messages[:index], tokenizer, answer_next=True)
    begin = _common(asked, whole)
    if begin == len(asked):
        text = whole[begin:]
        bare = text.lstrip()
        # The turn reaches to the first special token. It may begin with more than the words, an empty "thinking" block
        # say: the model has to write that too.
        turn = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))].rstrip()
        reply = messages[index + 1]["content"].strip() if index + 1 < len(messages) else ""
        endless = bare.startswith(words) and reply != "" and reply in turn  # no special token ends a turn here
        if turn.endswith(words) and not endless:
            return begin, begin + len(turn)
        if bare.startswith(words):
            return begin, begin + len(text) - len(bare) + len(words)
    else:
        # The generation prompt opens something (a "thinking" block) that the past does not show: the words alone are
        # learned.
        told = render(messages[:index], tokenizer)
        bare = whole[begin:].lstrip()
        start = len(whole) - len(bare) if bare.startswith(words) else whole.rfind(words, len(told), begin + len(words))
        if whole.startswith(told) and start >= len(told):
            return start, start + len(words)
    return None


def _common(one: str, other: str) -> int:
    """How many characters the two texts have in common at their beginning."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
