"""What is learned is the assistant's words and their end token, to the token, under every kind of template; else the row is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingraft.data.chat import encode_prompt, prompt_messages, render, segments
from ingraft.data.examples import IGNORED, Example, encode_sft
from ingraft.data.records import Chat, Message
from ingraft.data.rows import RowProblem
from ingraft.data.show import preview, token_texts
from ingraft.errors import IngraftError


def turns(*contents: str, system: str | None = None) -> list[Message]:
    made: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return made + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def learned_runs(example: Example, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels or [], strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def check(example: Example, messages: list[Message], tokenizer: Any, end: str) -> None:
    """The laws of one conversation."""
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert learned_runs(example, tokenizer) == [answer + end for answer in answers]
    first = next(n for n, m in enumerate(messages) if m["role"] == "assistant")
    prompt = encode_prompt(messages[:first], tokenizer)
    assert example.input_ids[: len(prompt)] == prompt, "the example begins with the tokens that the model is asked with"
    assert tokenizer.decode(example.input_ids) == render(messages, tokenizer)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=12).filter(
    lambda t: t.strip()
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(contents=st.lists(TEXT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0), system=st.none() | TEXT)
def test_any_conversation_is_masked_exactly(
    contents: list[str], system: str | None, chatml: Any, make_rows: Callable[..., Any]
) -> None:
    messages = turns(*contents, system=system)
    check(encode_sft(make_rows({"messages": messages}), chatml, 10_000)[0], messages, chatml, "<|im_end|>")


def test_a_seam_that_a_tokenizer_would_merge_stays_a_seam(chatml: Any, make_rows: Callable[..., Any]) -> None:
    messages = turns("Q", "\nA")  # the template's line break and the answer's are one token in this vocabulary
    whole = chatml.encode(render(messages, chatml), add_special_tokens=False)
    example = encode_sft(make_rows({"messages": messages}), chatml, 100)[0]
    assert example.input_ids != whole
    check(example, messages, chatml, "<|im_end|>")


def test_the_default_template_teaches_to_stop(bare: Any, make_rows: Callable[..., Any]) -> None:
    messages = turns("Q", "the answer", "more", "is it", system="S")
    check(encode_sft(make_rows({"messages": messages}), bare, 500)[0], messages, bare, "<|im_end|>")
    assert render(messages[:2], bare, answer_next=True) == "### System:\nS\n\n### User:\nQ\n\n### Assistant:\n"


HEAD = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
USER = "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
THINKING = (  # as Qwen 3: an empty thinking block in the last turn only
    HEAD + "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}" + USER
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
OPENED = (  # as the distilled R1: the generation prompt opens a block that the past does not show
    HEAD
    + "{{ m['content'] + '<|im_end|>\n' }}"
    + USER
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
SHOUTING = (
    HEAD
    + "{{ m['content'] | upper + '<|im_end|>\n' }}"
    + USER
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = "{% if messages | length > 2 %}{{ messages | length }}{% endif %}" + SHOUTING.replace(" | upper", "")


@pytest.mark.parametrize("answer", ["yes it is", "t", "<", "<think", "1\n2"])
@pytest.mark.parametrize(
    ("template", "runs"),
    [
        (THINKING, ["one<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"]),
        (OPENED, ["one<|im_end|>", "{}<|im_end|>"]),
        (ENDLESS, ["one", "{}<|im_end|>"]),
    ],
)
def test_templates_that_think_or_do_not_end(
    template: str, runs: list[str], answer: str, with_template: Any, make_rows: Callable[..., Any]
) -> None:
    tokenizer = with_template(template)
    example = encode_sft(make_rows({"messages": turns("A?", "one", "B?", answer)}), tokenizer, 500)[0]
    assert learned_runs(example, tokenizer) == [run.format(answer) for run in runs]


def test_templates_that_hide_the_answer_are_refused_by_name(with_template: Any, make_rows: Callable[..., Any]) -> None:
    rows = make_rows({"messages": turns("A?", "one")}, {"messages": turns("A?", "one", "B?", "two")})
    for template, lines in ((SHOUTING, (1, 2)), (FORGETFUL, (2,))):
        tokenizer = with_template(template)
        with pytest.raises(IngraftError) as caught:
            encode_sft(rows, tokenizer, 500)
        assert [p.split(" ")[0] for p in caught.value.problems[1:]] == [f"rows.jsonl:{line}:" for line in lines]
        assert all("chat template of" in p and "learn all" in p for p in caught.value.problems[1:])
        assert len(encode_sft(rows, tokenizer, 500, learn="all")) == 2, "the remedy that the message names"


def test_a_template_runs_sandboxed_and_its_refusal_is_passed_on(
    with_template: Any, make_rows: Callable[..., Any]
) -> None:
    rows = make_rows({"instruction": "Q", "output": "A"})
    with pytest.raises(
        IngraftError, match=r"rows.jsonl:1: the chat template of .* refuses this conversation: no system, please"
    ):
        encode_sft(rows, with_template("{{ raise_exception('no system, please') }}"), 100)
    for attack in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(10**9) | list }}",
    ):
        with pytest.raises(IngraftError, match="refuses this conversation"):
            encode_sft(rows, with_template(attack), 100)


def test_bare_prompts_and_completions(chatml: Any, bare: Any, make_rows: Callable[..., Any]) -> None:
    rows = make_rows({"prompt": "the sky is ", "completion": "blue"})
    check(encode_sft(rows, chatml, 100)[0], turns("the sky is ", "blue"), chatml, "<|im_end|>")
    for tokenizer, chat in ((bare, None), (chatml, False)):
        example = encode_sft(rows, tokenizer, 100, chat=chat)[0]
        assert tokenizer.decode(example.input_ids) == "the sky is blue<|im_end|>"
        assert learned_runs(example, tokenizer) == ["blue<|im_end|>"]
    check(encode_sft(rows, bare, 100, chat=True)[0], turns("the sky is ", "blue"), bare, "<|im_end|>")


def test_a_tokenizer_that_adds_a_space_does_not_add_it_inside(metaspace: Any, make_rows: Callable[..., Any]) -> None:
    example = encode_sft(make_rows({"prompt": "ab", "completion": "cd"}), metaspace, 100)[0]
    assert metaspace.convert_ids_to_tokens(example.input_ids) == ["<s>", "▁", "a", "b", "c", "d", "</s>"]
    assert example.labels is not None
    assert example.labels[:4] == [IGNORED] * 4


def test_a_greeting_is_read_but_not_learned(chatml: Any, make_rows: Callable[..., Any]) -> None:
    messages = [{"role": "assistant", "content": "hello"}, *turns("Q", "A")]
    assert learned_runs(encode_sft(make_rows({"messages": messages}), chatml, 100)[0], chatml) == ["A<|im_end|>"]


def test_learn_all_learns_all(chatml: Any, make_rows: Callable[..., Any]) -> None:
    example = encode_sft(make_rows({"instruction": "Q", "output": "A"}), chatml, 100, learn="all")[0]
    assert example.labels == example.input_ids
    with pytest.raises(IngraftError, match="'answer' or 'all'"):
        encode_sft(make_rows({"instruction": "Q", "output": "A"}), chatml, 100, learn="answers")


def test_prompt_messages_end_before_the_last_answer() -> None:
    assert prompt_messages(turns("a", "b", "c", "d")) == tuple(turns("a", "b", "c"))
    assert prompt_messages(turns("a")) == tuple(turns("a"))


def test_segments_join_to_the_rendering(chatml: Any) -> None:
    messages = turns("a", "b", "c", "d")
    assert "".join(s.text for s in segments(Chat(messages=tuple(messages)), chatml)) == render(messages, chatml)
    with pytest.raises(RowProblem):
        segments(Chat(messages=tuple(turns("a", "b"))), _Refusing())  # pyright: ignore[reportArgumentType]


class _Refusing:
    """A tokenizer whose template gives no text."""

    chat_template = "x"
    eos_token = None
    name_or_path = "refusing"

    def get_chat_template(self) -> str:
        return "x"

    def apply_chat_template(self, *args: object, **settings: object) -> list[int]:
        return [1]


def test_the_preview_shows_the_learned_words(chatml: Any, make_rows: Callable[..., Any]) -> None:
    row = make_rows({"instruction": "问", "output": "答 é"})[0]
    shown = preview(row, chatml)
    assert (
        "".join(text for text, _ in shown) == "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答 é<|im_end|>\n"
    )
    assert "".join(text for text, learned in shown if learned) == "答 é<|im_end|>"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_token_texts_join_to_the_text(text: str, chatml: Any) -> None:
    ids = chatml.encode(text, add_special_tokens=False)
    shown = token_texts(ids, chatml)
    assert len(shown) == len(ids)
    assert "".join(shown) == chatml.decode(ids)


def test_the_real_tokenizer_of_the_demo(smollm2: Any, make_rows: Callable[..., Any]) -> None:
    messages = turns("What is the formula for density?", "mass/volume.", "再说一遍", "质量除以体积。\n\nYes")
    example = encode_sft(make_rows({"messages": messages}), smollm2, 500)[0]
    check(example, messages, smollm2, "<|im_end|>")
    assert render(messages, smollm2).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    shown = preview(make_rows({"messages": messages})[0], smollm2)
    assert "".join(text for text, _ in shown) == render(messages, smollm2)
