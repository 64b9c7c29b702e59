"""Several files as one data set: shares are exact, every row has its turn, an order is a function of seed and epoch, and each file can be looked at alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ingraft import data
from ingraft.data.mixing import Mixture, Origin, short_names
from ingraft.errors import IngraftError
from ingraft.recipe import Source, as_recipe, to_yaml
from ingraft.recipe.yaml import scalar


def write(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(v, ensure_ascii=False) for v in values), encoding="utf-8")
    return str(path)


def origins(*files: tuple[int, float | None]) -> list[Origin]:
    found, start = list[Origin](), 0
    for number, (size, weight) in enumerate(files):
        there = range(start, start + size)
        found.append(Origin(name=str(number), file=str(number), rows=there, examples=there, shift=start, weight=weight))
        start += size
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 2.0, 1.0), (0.125, 0.7, 0.3)])
def test_shares_are_exact_to_one_row_and_every_row_has_its_turn(weights: tuple[float, ...]) -> None:
    """In every epoch; and over epochs no row of a file is seen twice more often than another."""
    made = Mixture(origins((100, weights[0]), (7, weights[1]), (30, weights[2])), seed=1)
    seen = Counter[int]()
    for number in range(9):
        epoch = made.epoch(number)
        assert len(epoch) == 137
        seen.update(epoch)
        for pool, weight in zip((range(100), range(100, 107), range(107, 137)), weights, strict=True):
            assert abs(sum(i in pool for i in epoch) - 137 * weight / sum(weights)) < 1
            times = [seen[i] for i in pool]
            assert max(times) - min(times) <= 1


def test_a_share_becomes_exact_with_the_size() -> None:
    """What is off by a row at 10 rows is off by a row at 100,000."""
    for size in (10, 1000, 100_000):
        made = Mixture(origins((size, 1.0), (size, 2.0)), seed=0)
        assert abs(made.quotas[0] / sum(made.quotas) - 1 / 3) <= 1 / (2 * size)


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    """Equal in another process and in any order of asking; another seed is another order."""
    files = origins((50, 1.0), (20, 3.0))
    one, other = Mixture(files, seed=3), Mixture(files, seed=3)
    ahead = [other.epoch(number) for number in (4, 2, 0)]
    assert [one.epoch(number) for number in (0, 2, 4)] == ahead[::-1]
    assert one.epoch(0) != one.epoch(1)
    assert one.epoch(0) != Mixture(files, seed=4).epoch(0)


def test_without_weights_every_row_is_seen_once_in_its_place() -> None:
    """So that one file is batched as it always was."""
    made = Mixture(origins((5, None), (3, None)), seed=0)
    assert made.epoch(0) == made.epoch(7) == list(range(8))
    assert not made.weighted


def test_a_weight_that_gives_no_row_is_refused() -> None:
    with pytest.raises(IngraftError, match="1: its weight is so small that an epoch of 12 rows holds none"):
        Mixture(origins((6, 1.0), (6, 0.001)), seed=0)


def files(folder: Path) -> list[Source]:
    """Three row forms that task sft reads, and one text that two files share."""
    asked = [{"instruction": f"add {n}.", "output": str(n + 1)} for n in range(30)]
    said = [
        {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "yo"}]}
        for n in range(19)
    ]
    told = [{"text": f"film {n}", "label": "good"} for n in range(10)]
    same = {"messages": [{"role": "user", "content": "add 3."}, {"role": "assistant", "content": "no"}]}
    return [
        Source(file=write(folder / "asked.jsonl", *asked), weight=2.0),
        Source(file=write(folder / "said.jsonl", *said, same), weight=1.0),
        Source(file=write(folder / "told.jsonl", *told), weight=1.0),
    ]


def test_files_of_different_forms_are_one_data_set(tmp_path: Path, chatml: Any) -> None:
    """Each row is what it is in its file alone, numbered on; classes and files keep their shares in what is held out; equal texts stay together."""
    got = data.load(files(tmp_path), chatml, eval=0.25, seed=2)
    assert got.report.format == "instruction, messages, text-label"
    for part in ("train", "eval"):
        whole = got.parts[part]
        for origin in whole.origins:
            assert {
                whole.rows[example.row_id].file
                for example in whole.examples[origin.examples.start : origin.examples.stop]
            } == {origin.file}
            alone = got.of(part, origin)
            kept = alone.parts[part]
            again = write(tmp_path / "again.jsonl", *(dict(row.values) for row in kept.rows))
            assert kept.examples == data.load(again, chatml).train
            assert (alone.train if part == "train" else alone.eval) == kept.examples
    assert [len(origin.rows) for origin in got.parts["eval"].origins] == [8, 5, 2]
    sides = [name for name, part in got.parts.items() for row in part.rows if "add 3." in json.dumps(row.values)]
    assert len(set(sides)) == 1 and len(sides) == 2


def test_the_report_says_what_an_epoch_holds_of_each_file(tmp_path: Path, chatml: Any) -> None:
    """Rows, how often each is seen, and the share of learned tokens, which is that of the loss."""
    got = data.load(files(tmp_path), chatml)
    seen = [got.parts["train"].examples[i] for i in got.mixture.epoch(0)]
    first = got.parts["train"].origins[0].examples
    learned = sum(got.parts["train"].examples[i].learned for i in got.mixture.epoch(0) if i in first)
    share = got.report.shares[0]
    assert (share.rows, share.times, share.of_rows) == (30, 1.0, 0.5)
    assert share.of_learned == pytest.approx(learned / sum(e.learned for e in seen), abs=0.02)  # rows differ in length
    assert sum(each.of_learned for each in got.report.shares) == pytest.approx(1)
    text = "\n".join(got.report.lines())
    assert "said.jsonl: 15 rows (25.0%), each seen 0.75 times" in text
    assert json.loads(json.dumps(got.report.as_dict()))["parts"][0]["files"][1]["rows"] == 20


def test_blocks_of_text_keep_to_their_file(tmp_path: Path, chatml: Any) -> None:
    """Of each running text the end is held out, and no block holds words of two files."""
    for name, word in (("a", "aa"), ("b", "zz")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{word} {n}" for n in range(60)))
    got = data.load([Source(file=str(tmp_path / f"{n}.txt")) for n in "ab"], chatml, task="lm", eval=0.1, max_length=32)
    assert [len(o.rows) for o in got.parts["eval"].origins] == [6, 6]
    assert [row.line for row in got.parts["eval"].rows] == [*range(55, 61)] * 2
    assert [example.row_id for example in got.train] == list(range(len(got.train)))
    for example in got.train:
        text = chatml.decode(example.input_ids)
        assert ("aa" in text) != ("zz" in text)


def test_several_sequences_a_row_move_together(tmp_path: Path, chatml: Any) -> None:
    """Preferences: all sequences of a row have the row's number."""
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", *({"prompt": f"{name}{n}", "chosen": "y", "rejected": "n"} for n in range(3)))
    got = data.load([Source(file=str(tmp_path / f"{n}.jsonl")) for n in "ab"], chatml, task="dpo")
    assert [[one.row_id for one in row.sequences] for row in got.train] == [[n, n] for n in range(6)]


def test_every_broken_file_is_named(tmp_path: Path, chatml: Any) -> None:
    good = write(tmp_path / "good.jsonl", {"instruction": "q", "output": "a"})
    bad = write(tmp_path / "bad.jsonl", {"instruction": "q"}, {"instruction": "q", "output": "a"})
    other = write(tmp_path / "other.jsonl", {"text": "only text"})
    with pytest.raises(IngraftError) as caught:
        data.load([Source(file=good), Source(file=bad), Source(file=other)], chatml)
    text = "\n".join(caught.value.problems)
    assert "bad.jsonl:1" in text and "other.jsonl" in text and "good.jsonl" not in text


def test_short_names_tell_files_apart() -> None:
    assert short_names(["x/a.jsonl", "y/b.csv.gz"]) == ["a", "b"]
    assert short_names(["x/train.jsonl", "y/train.jsonl"]) == ["x/train", "y/train"]
    assert short_names(["train.jsonl", "train.csv"]) == ["train-1", "train-2"]


def written(value: Any) -> Any:
    return as_recipe({"model": "x", "data": {"train": value}}).data.train


def test_files_may_be_written_in_any_of_the_ways() -> None:
    a, b = Source(file="a.jsonl"), Source(file="b.jsonl")
    assert written("a.jsonl=2") == "a.jsonl=2"  # one file has no use for a weight
    assert written(["a.jsonl"]) == written({"file": "a.jsonl"}) == "a.jsonl"
    assert written(["a.jsonl", "b.jsonl"]) == [a, b]
    weighted = [Source(file="a.jsonl", weight=3.0), Source(file="b.jsonl", weight=0.5, format="text")]
    assert written(["a.jsonl=3", {"file": "b.jsonl", "weight": 0.5, "format": "text"}]) == weighted
    recipe = as_recipe({"model": "x", "data": ["a.jsonl", "b.jsonl"]})
    assert recipe.output_dir == "runs/a-b-lora"
    assert as_recipe(scalar(to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "empty list"),
        (["a", 3], "entry 2 should be a file"),
        ([{"fil": "a"}, "b"], "did you mean 'file'"),
        ([{"file": "a", "weight": 0}, "b=1"], "weight should be a number greater than 0, got 0"),
        ([{"file": "a", "weight": True}, "b=1"], "greater than 0, got True"),
        (["a", "b", "a"], "names a more than once; to see it more often, give it a weight"),
        (["a=1", "b"], "b: has no weight and others do"),
    ],
)
def test_wrong_files_are_refused(value: Any, said: str) -> None:
    with pytest.raises(IngraftError, match=said):
        written(value)


def test_a_weight_of_evaluation_rows_is_refused() -> None:
    with pytest.raises(IngraftError, match=r"data.eval: e, f: a weight is for training files only"):
        as_recipe({"model": "x", "data": {"train": "a", "eval": [{"file": "e", "weight": 2}, "f=1"]}})
