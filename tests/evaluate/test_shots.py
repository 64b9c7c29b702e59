"""Prompts that show answered rows first: what they are word for word, who is shown to whom, and what calibration does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ingraft.data.dataset import DataSet, Part
from ingraft.data.demonstrations import Shots, behind, distinct, draw
from ingraft.data.examples import IGNORED, as_chat
from ingraft.data.records import Chat, Labelled, Message, Record, given
from ingraft.data.rows import Row
from ingraft.errors import IngraftError
from ingraft.evaluate.shots import ShotScorer, calibrated, last_learned

WORDS = [
    "<unk>",
    "</s>",
    "<pad>",
    "user",
    "assistant",
    "system",
    "up",
    "down",
    "bright",
    "dim",
    "it",
    "is",
    "?",
    "n/a",
    "a",
    "b",
    "c",
    "d",
]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def tokenizer_with(template: str | None, places: int = 256) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=places
    )
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    made = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, pad_token_id=2, eos_token_id=1)).eval()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def labelled(*pairs: tuple[str, str]) -> list[Record]:
    return [Labelled(text=text, text2=None, label=label) for text, label in pairs]


POOL = labelled(("a a", "1"), ("a b", "0"), ("b b", "1"), ("c c", "0"), ("c d", "1"), ("d d", "0"))
ASKED = labelled(("a c", "1"), ("b b", "0"), ("d a", "1"), ("c b", "0"))
HOW = Shots(count=2, question="{text} it is {labels} ?", words={"0": "dim", "1": "bright"})


def data_of(records: list[Record]) -> Any:
    rows = [Row(values={}, file="f", line=n + 1) for n in range(len(records))]
    part = Part(rows=rows, records=records, examples=[])
    return DataSet(train=[], eval=[], test=[], labels=None, scale=None, report=None, parts={"eval": part}, mixture=None)  # type: ignore[arg-type]


def text_of(ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in ids)


def test_the_prompt_word_for_word(model: Any) -> None:
    """Demonstrations are earlier turns of the template, answered by the labels' words; nothing is learned but the row's own answer."""
    scorer = ShotScorer(model, tokenizer_with(TEMPLATE), HOW, POOL)
    own = [HOW.chat(record, ["0", "1"]) for record in ASKED[:1]]
    (example,), _ = scorer.encoded_behind(own, data_of(ASKED[:1]).parts["eval"].rows, [[3, 0]], ["0", "1"])
    assert text_of(example.input_ids) == (
        "user c c it is dim, bright ? </s> assistant dim </s> user a a it is dim, bright ? </s> assistant bright </s> "
        "user a c it is dim, bright ? </s> assistant bright </s>"
    ).replace("dim,", "<unk>")
    assert example.labels is not None
    assert text_of([label for label in example.labels if label != IGNORED]) == "bright </s>"
    assert example.labels[-2:] == example.input_ids[-2:]
    (row,) = scorer.among(ASKED[:1], data_of(ASKED[:1]).parts["eval"].rows, [[3, 0]], ["0", "1"])
    assert row.prompt == example.input_ids[:-2]
    assert [text_of([*choice]) for choice in row.choices] == ["dim", "bright"]


def test_plain_text_where_nothing_else_is_known() -> None:
    """Bare prompts for a base without a template: one behind the other. A system's turn stays in front, and is the row's own."""
    shown = [
        Chat(messages=(Message(role="user", content=q), Message(role="assistant", content=a)), plain=True)
        for q, a in (("Q1:", " A1"), ("Q2:", " A2"))
    ]
    assert behind(shown[:1], shown[1], as_text=True).messages[0]["content"] == "Q1: A1\n\nQ2:"
    assert behind(shown[:1], shown[1], as_text=True).plain
    turns = behind(shown[:1], shown[1], as_text=False)
    assert [message["content"] for message in turns.messages] == ["Q1:", " A1", "Q2:", " A2"] and not turns.plain
    system = Chat(messages=(Message(role="system", content="S"), *shown[1].messages))
    other = Chat(messages=(Message(role="system", content="no"), *shown[0].messages))
    assert [m["content"] for m in behind([other], system, as_text=False).messages] == ["S", "Q1:", " A1", "Q2:", " A2"]
    assert behind([], system, as_text=True) is system


def test_texts_with_braces_and_pairs_are_asked_as_they_stand() -> None:
    how = Shots(question="{text} / {text2} / {labels}")
    chat = how.chat(Labelled(text="{labels} {text2}", text2="{text}", label="x"), ["x", "y"])
    assert chat is not None and chat.messages[0]["content"] == "{labels} {text2} / {text} / x, y"
    both = Shots(question="{text}!").chat(Labelled(text="one", text2="two", label="x"), ["x"])
    assert both is not None and both.messages[0]["content"] == "one\n\ntwo!"


@pytest.mark.parametrize("select", ["fixed", "random", "nearest"])
def test_a_row_is_never_shown_to_itself(select: Any) -> None:
    """Nor what reads the same, even as the nearest; none is shown twice; the order of the rows changes nothing, the seed does what it is for."""
    pool = distinct([*POOL, POOL[0], *ASKED])
    assert len(pool) == 9, "'a a' is there twice, and so is 'b b'"
    near = np.array([[float(given(row) == given(one)) for one in pool] for row in ASKED])
    how = Shots(count=3, select=select)
    found = draw(pool, ASKED, how, near)
    for row, places in zip(ASKED, found, strict=True):
        assert len(set(places)) == 3
        assert given(row) not in [given(pool[place]) for place in places]
    assert draw(pool, ASKED[::-1], how, near[::-1])[::-1] == found
    others = [draw(pool, ASKED, Shots(count=3, select=select, seed=seed), near) for seed in range(8)]
    assert (others.count(found) == 8) is (select == "nearest")
    assert draw(pool, ASKED, Shots(select=select), near) == [[], [], [], []]


def test_who_is_shown() -> None:
    """Fixed ones are the same for all and balanced; the nearest stands last, next to the question."""
    found = draw(POOL, ASKED, Shots(count=4))
    assert found[0] == found[2] == found[3]
    assert sorted(record.label for record in (POOL[place] for place in found[0]) if isinstance(record, Labelled)) == [
        "0",
        "0",
        "1",
        "1",
    ]
    near = np.array([[0.1, 0.9, 0.3, 0.2, 0.5, 0.0]])
    assert draw(POOL, ASKED[:1], Shots(count=3, select="nearest"), near) == [[2, 4, 1]]
    with pytest.raises(IngraftError, match="only 5 different rows to show, the row that is asked not counted"):
        draw(POOL, ASKED, Shots(count=6))


def test_the_nearest_are_those_whose_states_are_nearest(model: Any) -> None:
    """By the mean of the last states, computed here one by one; the same words in another row are as near as can be."""
    scorer = ShotScorer(
        model, tokenizer_with(TEMPLATE), Shots(count=1, select="nearest"), [*POOL, *labelled(("c b", "1"))]
    )
    e_ND = scorer.vectors(scorer.pool, 3, None)
    for record, e_D in zip(scorer.pool, e_ND, strict=True):
        ids = torch.tensor([scorer.tokenizer(given(record))["input_ids"]])
        mean_D = model.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(e_D, mean_D / mean_D.norm(), atol=1e-5)
    asked = labelled(("b c", "1"))
    (place,) = scorer.demonstrations(asked)[0]
    (e_D,) = scorer.vectors(asked, 1, None)
    assert place == int((e_ND @ e_D).argmax())


def test_scores_are_those_of_the_words_behind_the_prompt(model: Any) -> None:
    """Zero-shot and few-shot: the likeliest label word of the very prompt, and the loss of the right one with the end behind it."""
    for count in (0, 2):
        how = Shots(count=count, question=HOW.question, words=HOW.words)
        scorer = ShotScorer(model, tokenizer_with(TEMPLATE), how, POOL)
        found = scorer.outcomes(data_of(ASKED), "eval", batch_size=3)
        shown = scorer.demonstrations(ASKED)
        own = [how.chat(record, ["0", "1"]) for record in ASKED]
        examples, _ = scorer.encoded_behind(own, data_of(ASKED).parts["eval"].rows, shown, ["0", "1"])
        right, loss = 0, 0.0
        for record, example in zip(ASKED, examples, strict=True):
            logs = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1).detach()
            at = len(example.input_ids) - 3
            said = "1" if logs[at, WORDS.index("bright")] > logs[at, WORDS.index("dim")] else "0"
            right += isinstance(record, Labelled) and said == record.label
            loss -= float(logs[at, example.input_ids[at + 1]] + logs[at + 1, example.input_ids[at + 2]])
        assert found.metrics()["accuracy"] == right / 4
        assert found.metrics()["loss"] == pytest.approx(loss / 8, rel=1e-4)
        assert found.metrics().keys() == {"loss", "perplexity", "accuracy", "macro_f1"}


def test_calibrated_shares_add_up_to_one_and_take_a_bias_away(model: Any) -> None:
    """What is said of nothing becomes even; a head that loves one word is no better or worse for it."""
    assert sum(calibrated([-3.0, -1.0, -2.5], [0.2, 0.7, 0.1])) == pytest.approx(1, abs=1e-12)
    prior = calibrated([-4.0, -1.0])
    assert calibrated([-4.0, -1.0], prior) == pytest.approx((0.5, 0.5))
    assert calibrated([-3.0, -1.0], prior)[0] > 0.5 > calibrated([-3.0, -1.0])[0]
    assert all(map(math.isfinite, calibrated([0.0, -900.0], (1.0, 0.0))))
    how = Shots(count=2, question=HOW.question, words=HOW.words, calibrate=True)
    plain = ShotScorer(model, tokenizer_with(TEMPLATE), how, POOL).outcomes(data_of(ASKED), "eval")
    head = model.lm_head
    bias = torch.zeros(len(WORDS))
    bias[WORDS.index("dim")] = 8.0
    handle = head.register_forward_hook(lambda module, args, out: out + bias)
    try:
        bent = ShotScorer(model, tokenizer_with(TEMPLATE), how, POOL)
        priors = bent.priors([[0, 1], [2, 3], [0, 1]], ASKED, ["0", "1"])
        for prior in priors:
            assert sum(prior) == pytest.approx(1)
            assert prior[0] > 0.9
        assert priors[0] == priors[2] != priors[1]
        assert bent.outcomes(data_of(ASKED), "eval").metrics()["accuracy"] == plain.metrics()["accuracy"]
    finally:
        handle.remove()


def test_demonstrations_without_room_are_left_out_and_counted(model: Any) -> None:
    """The first ones first; a row that has no room even alone loses the middle of its prompt, and that is said."""
    long = labelled(("a " * 40, "1"))
    scorer = ShotScorer(model, tokenizer_with(TEMPLATE, places=44), HOW, POOL)
    own = [HOW.chat(record, ["0", "1"]) for record in (*ASKED[:1], *long)]
    rows = data_of([*ASKED[:1], *long]).parts["eval"].rows
    examples, shown = scorer.encoded_behind(own, rows, [[1, 2, 3, 0], [0, 1]], ["0", "1"])
    assert shown == [[3, 0], []]
    assert [(example.row_id, len(example) <= 44, example.labels is not None) for example in examples] == [
        (0, True, True),
        (1, True, True),
    ]
    assert text_of(examples[1].input_ids[-2:]) == "bright </s>"
    assert (
        "2 rows were shown fewer than 2 demonstrations, down to 0: the base has places for 44 tokens" in scorer.notes[0]
    )
    assert "1 rows are longer than the 44 tokens" in scorer.notes[1]


def test_only_a_rows_own_answers_are_learned() -> None:
    from ingraft.data.examples import Example

    example = Example(input_ids=list(range(10)), labels=[-100, 1, -100, 3, 4, -100, 6, -100, 8, 9], row_id=0)
    assert last_learned(example, 1).labels == [-100] * 8 + [8, 9]
    assert last_learned(example, 2).labels == [-100] * 6 + [6, -100, 8, 9]
    assert last_learned(example, 9).labels == example.labels


def test_what_cannot_be_asked_is_refused_all_at_once() -> None:
    how = Shots(question="which?", words={"2": "x", "0": "y", "1": "y"}, calibrate=True)
    with pytest.raises(IngraftError) as caught:
        how.check(["0", "1"])
    assert len(caught.value.problems) == 3
    assert any("no row is labelled '2'; the labels are 0, 1" in text for text in caught.value.problems)
    with pytest.raises(IngraftError, match="can be calibrated"):
        Shots(calibrate=True).check([])
    assert as_chat(POOL[0]) is not None
