"""Metrics against answers worked out by hand, and against their definitions."""

from __future__ import annotations

import math
import random
import sys

import pytest

from ingraft.errors import IngraftError
from ingraft.evaluate import choices, measures
from ingraft.evaluate.spans import exact_match, f1
from ingraft.evaluate.tags import marked


def test_classes() -> None:
    """Three of four right; class 2 is neither there nor said and has no part in the macro mean."""
    found = measures.of_classes([0, 0, 1, 3], [0, 1, 1, 3])
    assert found["accuracy"] == found["micro_f1"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert measures.of_classes([0, 0, 1, 1], [0, 1, 0, 1])["matthews"] == 0.0
    assert measures.of_classes([0, 1], [0, 1])["matthews"] == 1.0
    assert measures.of_classes([0, 1], [1, 1])["matthews"] == 0.0, "constant: 0, and no warning"
    rng = random.Random(0)
    labels, said = ([rng.randrange(4) for _ in range(50)] for _ in range(2))
    assert choices.macro_f1(said, labels) == pytest.approx(measures.of_classes(labels, said)["macro_f1"])


def test_several_labels() -> None:
    """Of two rows and three classes: one row wholly right; three right, one missed, one too many."""
    found = measures.of_several([[1, 0, 1], [1, 0, 1]], [[1, 0, 1], [1, 1, 0]])
    assert found == {"micro_f1": 0.75, "macro_f1": pytest.approx((1 + 0 + 2 / 3) / 3), "exact_match": 0.5}


def test_numbers() -> None:
    found = measures.of_numbers([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 17.0])
    assert (found["mse"], found["mae"], found["spearman"]) == (52.25, 5.25, pytest.approx(1.0))
    x, y = [-1.5, -0.5, 0.5, 1.5], [-6.75, -3.75, 1.25, 9.25]
    wanted = sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    assert found["pearson"] == pytest.approx(wanted)
    assert measures.of_numbers([1.0, 2.0], [3.0, 3.0])["pearson"] == 0.0, "constant: 0, and no warning"


@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
def test_entities(scheme: str) -> None:
    """An entity counts if it is right as a whole: two of three found, one of the three said is wrong at its end."""
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC", "I-LOC"]]
    said = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC", "O"]]
    if scheme == "BIOES":
        right = [["B-PER", "E-PER", "O", "S-LOC"], ["O", "B-LOC", "I-LOC", "E-LOC"]]
        said = [["B-PER", "E-PER", "O", "S-LOC"], ["O", "B-LOC", "E-LOC", "O"]]
    found = measures.of_tags(right, said)
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(7 / 8 if scheme == "BIO" else 6 / 8)
    nothing = measures.of_tags(right, [["O"] * 4, ["O"] * 4])
    assert (nothing["f1"], nothing["precision"]) == (0.0, 0.0)


def test_tags_that_mark_no_entities() -> None:
    found = measures.of_tags([["NOUN", "VERB"], ["NOUN", "O"]], [["NOUN", "NOUN"], ["NOUN", "O"]])
    assert set(found) == {"accuracy", "macro_f1"}
    assert found["accuracy"] == 0.75


def test_marked_words_are_for_people() -> None:
    words, tags = ["I", "saw", "New", "York", "Ann"], ["O", "O", "B-LOC", "I-LOC", "B-PER"]
    assert marked(words, tags) == "New York [LOC]; Ann [PER]"
    assert marked(["北", "京"], ["B-GPE.NAM", "I-GPE.NAM"]) == "北京 [GPE.NAM]"
    assert marked(["a"], ["O"]) == "(nothing)"


@pytest.mark.parametrize(
    ("said", "right", "exact", "share"),
    [
        ("The Broncos!", ["Broncos", "Denver Broncos"], True, 1.0),
        ("a  big   DOG.", ["big dog"], True, 1.0),
        ("Denver", ["Denver Broncos"], False, 2 / 3),
        ("of the house", ["house of cards"], False, 0.8),
        ("", ["x"], False, 0.0),
        ("the", ["a"], True, 1.0),
        ("theatre", ["atre"], False, 0.0),
        ("北京大学", ["北京"], False, 2 * 2 / (4 + 2)),
        ("“北京”。", ["北京"], True, 1.0),
        ("1998年", ["1998 年"], True, 1.0),
        ("１９９８年", ["1998年"], True, 1.0),
        ("$5", ["5"], True, 1.0),
    ],
)
def test_answers_are_compared_as_squad_and_mlqa_do(said: str, right: list[str], exact: bool, share: float) -> None:
    assert exact_match(said, right) is exact
    assert f1(said, right) == pytest.approx(share)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "find_spec", lambda name: None if name == "seqeval" else sys.modules)
    measures.require("classify", ("sklearn",))
    with pytest.raises(IngraftError, match=r"metrics of 'tag' are computed by seqeval.*pip install seqeval"):
        measures.require("tag", ("sklearn", "seqeval"))
