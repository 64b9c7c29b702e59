"""Words and passages as tokens: which token stands for what, whatever the tokenizer, and what is said of what is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ingraft import data
from ingraft.data.examples import IGNORED, Tally
from ingraft.data.formats import read_records
from ingraft.data.spans import ELSEWHERE, place_of
from ingraft.data.tagged import encode_tagged, sentence, tag_names
from ingraft.errors import IngraftError


def pieces() -> PreTrainedTokenizerFast:
    """WordPiece over letters and a few endings: every word of ASCII letters becomes one token or several."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = {
        name: n for n, name in enumerate([*names, *letters, *[f"##{c}" for c in letters], "the", "##ing", "中", "国"])
    }
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(params=["pieces", "chatml", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """WordPiece, byte level, SentencePiece's way."""
    return pieces() if request.param == "pieces" else request.getfixturevalue(request.param)


WORDS = ["the", "thing", "a", "going", "x", "wording", "or", "isthe"]


def test_the_first_token_of_every_word_has_its_tag(tokenizer: Any, make_rows: Any) -> None:
    """The tokens from one learned place to the next are that word's, in its order, and nothing else is learned."""
    rng = random.Random(1)
    values = []
    for _ in range(20):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 9))]
        values.append({"tokens": words, "tags": [rng.choice(["O", "B-X", "I-X"]) for _ in words]})
    rows = make_rows(*values)
    records = read_records(rows)[1]
    labels = tag_names(records)
    assert labels[0] == "O"
    examples = encode_tagged(records, rows, tokenizer, labels, 500, tally=Tally())
    for value, example in zip(values, examples, strict=True):
        begins = [at for at, word in enumerate(example.words or []) if word >= 0]
        assert [(example.words or [])[at] for at in begins] == list(range(len(value["tokens"])))
        assert [at for at, label in enumerate(example.labels or []) if label != IGNORED] == begins
        assert [labels[(example.labels or [])[at]] for at in begins] == value["tags"]
        special = set(tokenizer.all_special_ids)
        for number, (start, end) in enumerate(zip(begins, [*begins[1:], len(example)], strict=True)):
            ids = [token for token in example.input_ids[start:end] if token not in special]
            assert tokenizer.decode(ids).replace("##", "").replace(" ", "") == value["tokens"][number]
        assert example.learned == len(value["tokens"])


def test_chinese_characters_stand_close_and_words_apart() -> None:
    assert sentence(["我", "爱", "New", "York", "。"]) == "我爱 New York 。"
    assert sentence(["北", "京", "，", "好"]) == "北京，好"


def test_words_that_are_lost_are_counted(make_rows: Any) -> None:
    """Cut away at max_length, or nothing to the tokenizer (a zero-width joiner)."""
    rows = make_rows({"tokens": ["the", "\u200d", "xyz", "a"], "tags": ["O", "B-X", "B-X", "O"]})
    tally = Tally()
    (example,) = encode_tagged(read_records(rows)[1], rows, pieces(), ["O", "B-X"], 5, tally=tally)
    assert example.words == [-1, 0, 2, -1, -1]
    assert tally.cut == 1
    assert tally.more == {"words cut away at max_length": 1, "words that the tokenizer makes nothing of": 1}


@pytest.mark.parametrize(
    ("task", "values", "said"),
    [
        ("tag", {"tokens": ["a", " "], "tags": ["O", "O"]}, r"rows\.jsonl:3: token 2 of 'tokens' is empty"),
        ("tag", {"tokens": ["a"], "tags": ["O", "O"]}, r"rows\.jsonl:3: 1 tokens but 2 tags"),
        ("regress", {"text": "a", "label": "good"}, r"rows\.jsonl:3: field 'label' is 'good', not a finite number.*classify"),
        ("regress", {"text": "a", "label": float("nan")}, r"rows\.jsonl:3: field 'label' is nan"),
        ("regress", {"text": " ", "label": 1}, r"rows\.jsonl:3: field 'text' is empty"),
        ("multi-label", {"text": "a", "label": "[x"}, r"rows\.jsonl:3: field 'label' begins like a JSON list"),
        ("multi-label", {"text": "a", "label": [0.5]}, r"rows\.jsonl:3: field 'label' is the number 0.5"),
        ("classify", {"text": "a", "label": ["x", "y"]}, r"rows\.jsonl:3: field 'label' is a list.*multi-label"),
        ("qa", {"context": "a b", "question": "c", "answers": [{"text": "x", "answer_start": 0}]}, "does not stand at character 0"),
        ("qa", {"context": "a b", "question": "c", "answers": [{"text": " ", "answer_start": 1}]}, r"rows\.jsonl:3: answer 1 is empty"),
        ("qa", {"context": "a b", "question": "c", "answers": []}, r"rows\.jsonl:3: has no answer"),
        ("qa", {"context": "a b", "question": "c " * 90, "answers": [{"text": "a", "answer_start": 0}]}, "leaves room for 0 tokens"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(task: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    good: dict[str, list[dict[str, Any]]] = {
        "tag": [{"tokens": ["a"], "tags": [tag]} for tag in ("O", "B-X")],
        "regress": [{"text": "a", "label": number} for number in (1, 2.5)],
        "multi-label": [{"text": "a", "label": names} for names in (["x", "y"], "x")],
        "classify": [{"text": "a", "label": name} for name in "xy"],
        "qa": [{"context": "a b", "question": "c", "answers": [{"text": "a", "answer_start": 0}]}] * 2,
    }
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [*good[task], values]))
    with pytest.raises(IngraftError, match=said):
        data.load(str(file), pieces(), task=task, max_length=64)


@pytest.mark.parametrize(("task", "seen", "other", "what"), [
    ("tag", [{"tokens": ["a", "b"], "tags": ["O", "B-PER"]}], {"tokens": ["a"], "tags": ["B-PRE"]}, "tag 'B-PRE' is unknown (did you mean 'B-PER'?)"),
    ("multi-label", [{"text": "a", "label": ["x", "y"]}], {"text": "a", "label": ["x", "z"]}, "label 'z' is unknown"),
])  # fmt: skip
def test_what_training_does_not_have_is_named(
    task: str, seen: list[dict[str, Any]], other: dict[str, Any], what: str, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in seen))
    (tmp_path / "eval.jsonl").write_text(json.dumps(other))
    with pytest.raises(IngraftError) as caught:
        data.load(str(tmp_path / "train.jsonl"), pieces(), task=task, eval=str(tmp_path / "eval.jsonl"))
    assert "eval.jsonl:1: " + what in str(caught.value)


def test_several_labels_in_jsonl_and_in_a_table(tmp_path: Path) -> None:
    """A list, one label alone, none; in a cell the list is spelled as JSON. Repeats are one."""
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": "a", "label": label}) for label in (["x", "y", "x"], "y", []))
    )
    (tmp_path / "a.csv").write_text('text,label\na,"[""x"", ""y"", ""x""]"\na,y\na,[]\n')
    found = [data.load(str(tmp_path / name), pieces(), task="multi-label") for name in ("a.jsonl", "a.csv")]
    for one in found:
        assert one.labels == ("x", "y")
        assert [example.values for example in one.train] == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]
    assert "labels a row: 0 in 1 rows, 1 in 1 rows, 2 in 1 rows" in "\n".join(found[0].report.lines())


def test_numbers_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1.5\nb,-2\n")
    found = data.load(str(tmp_path / "a.csv"), pieces(), task="regress")
    assert [example.values for example in found.train] == [(1.5,), (-2.0,)]
    assert found.scale == (-0.25, 1.75)
    assert "labels: from -2 to 1.5, mean -0.25" in "\n".join(found.report.lines())


@pytest.mark.parametrize(("max_length", "stride"), [(16, 4), (24, 128), (24, 0), (500, 128)])
def test_windows_cover_the_context(tokenizer: Any, max_length: int, stride: int, tmp_path: Path) -> None:
    """Windows in order make up the whole context and overlap as asked (at most by half); where the answer is whole in one, its tokens are the ones
    that the characters say, elsewhere the place is token 0.
    """
    rng = random.Random(2)
    values = []
    for _ in range(12):
        words = [rng.choice(WORDS) for _ in range(rng.randint(3, 30))]
        at = rng.randrange(len(words) - 1)
        start = len(" ".join([*words[:at], ""]))
        values.append({"context": " ".join(words), "question": "is", "answers": [{"text": " ".join(words[at : at + 2]), "answer_start": start}]})  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in values))
    found = data.load(str(tmp_path / "a.jsonl"), tokenizer, task="qa", max_length=max_length, stride=stride)
    room = (
        max_length
        - tokenizer.num_special_tokens_to_add(pair=True)
        - len(tokenizer("is", add_special_tokens=False)["input_ids"])
    )
    for number, value in enumerate(values):
        windows = [example for example in found.train if example.row_id == number]
        inside = [[place for place in window.characters or [] if place != ELSEWHERE] for window in windows]
        whole = [
            (s, e)
            for s, e in tokenizer(value["context"], add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
        ]
        assert all(len(window) <= max_length for window in windows)
        shared = min(stride, room // 2)
        put = inside[0]
        for later in inside[1:]:
            assert put[len(put) - shared :] == later[:shared]
            put = put + later[shared:]
        assert put == whole
        text, start = value["answers"][0]["text"], value["answers"][0]["answer_start"]
        for window, places in zip(windows, inside, strict=True):
            assert window.span is not None
            covered = places[0][0] <= start and start + len(text) <= places[-1][1]
            assert (window.span != (0, 0)) == covered
            if covered:
                first, last = ((window.characters or [])[at] for at in window.span)
                assert value["context"][first[0] : last[1]].strip() == text
    if max_length == 500:
        assert len(found.train) == len(values)
    else:
        assert "rows in several windows" in "\n".join(found.report.lines())


def test_the_place_of_an_answer_with_spaces_round_it() -> None:
    places = [ELSEWHERE, (0, 2), (3, 5), (6, 9), ELSEWHERE]
    assert place_of((" is ", 2), places) == (2, 2)
    assert place_of(("is the", 3), places) == (2, 3)
    assert place_of(("he", 7), places) == (3, 3), "a token holds more than the answer"
    assert place_of(("x is", 0), places[2:]) == (0, 0)


def test_questions_about_one_context_stay_together(tmp_path: Path) -> None:
    values = [
        {"context": f"a {chr(97 + n % 9)}", "question": "q " + "b" * n, "answers": [{"text": "a", "answer_start": 0}]}
        for n in range(36)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in values))
    found = data.load(str(tmp_path / "a.jsonl"), pieces(), task="qa", eval=8)
    train, held = ({row.values["context"] for row in found.parts[part].rows} for part in ("train", "eval"))
    assert len(found.parts["eval"].rows) == 8
    assert not train & held
