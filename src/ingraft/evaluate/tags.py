"""A tagger, judged on the words of the rows, those that it never saw included: what was cut away counts as untagged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch.nn import functional as F

from ingraft.data.examples import IGNORED, Example
from ingraft.data.records import Tagged
from ingraft.data.tagged import OUTSIDE, sentence
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.measures import of_tags
from ingraft.evaluate.outputs import outputs
from ingraft.evaluate.scorer import Asked, Done, Scorer

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row


class TagScorer(Scorer):
    """Cross entropy of the words' tags as the loss; accuracy of the words, and F1 of whole entities where tags mark those."""

    task: ClassVar[str] = "tag"
    headline: ClassVar[str] = "f1"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "precision", "recall", "f1", "macro_f1")
    needs: ClassVar[tuple[str, ...]] = ("sklearn", "seqeval")

    def tags(
        self,
        part: Part,
        examples: Sequence[Example],
        batch_size: int = 8,
        poll: Poll | None = None,
        done: Callable[[int, list[str]], None] | None = None,
    ) -> tuple[float, list[list[str]]]:
        """The mean loss of the words in nats, and the likeliest tag of each word of each row."""
        losses, counted = [0.0] * len(examples), 0
        found: list[list[str]] = [[] for _ in examples]
        nothing = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        for positions, logits_BTK, labels_BT in outputs(self.model, examples, self.pad_id, batch_size, poll):
            losses_BT = F.cross_entropy(logits_BTK.transpose(1, 2), labels_BT, reduction="none")  # 0 where ignored
            counted += int((labels_BT != IGNORED).sum())
            columns = zip(positions, losses_BT.double().sum(1).tolist(), logits_BTK.argmax(-1).tolist(), strict=True)
            for position, loss, best in columns:
                example = examples[position]
                said = [nothing] * len(_words(part, example))
                for word, tag in zip(example.words or (), best, strict=False):  # behind the row is padding
                    if word >= 0:
                        said[word] = self.labels[tag]
                losses[position], found[position] = loss, said
                if done is not None:
                    done(position, said)
        return math.fsum(losses) / max(1, counted), found

    def evaluate(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> dict[str, float]:
        del whole
        rows = data.parts[part]
        loss, said = self.tags(rows, rows.examples, batch_size, poll)
        return {"loss": loss, **of_tags([_tags(rows, example) for example in rows.examples], said)}

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for example in examples:
            words = _words(part, example)
            found.append({"prompt": sentence(words), "expected": marked(words, _tags(part, example))})
        return found

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        said = self.tags(part, examples, poll=poll)[1]
        return [marked(_words(part, example), tags) for example, tags in zip(examples, said, strict=True)]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        def told(position: int, tags: list[str]) -> None:
            done(position, {"prediction": tags})

        part = self.encoded(rows, asked)
        self.tags(part, part.examples, asked.batch_size, done=told)


def marked(words: Sequence[str], tags: Sequence[str]) -> str:
    """The tagged words for people: neighbours of one kind together, with their kind."""
    groups: list[tuple[str, list[str]]] = []
    before = OUTSIDE
    for word, tag in zip(words, tags, strict=True):
        prefix, dash, kind = tag.partition("-")
        kind = kind if dash else tag
        if tag != OUTSIDE:
            if groups and before == kind and prefix not in ("B", "S", "U"):
                groups[-1][1].append(word)
            else:
                groups.append((kind, [word]))
        before = OUTSIDE if tag == OUTSIDE else kind
    return "; ".join(f"{sentence(members)} [{kind}]" for kind, members in groups) or "(nothing)"


def _words(part: Part, example: Example) -> tuple[str, ...]:
    record = part.records[example.row_id]
    assert isinstance(record, Tagged), "the task's records"
    return record.tokens


def _tags(part: Part, example: Example) -> tuple[str, ...]:
    record = part.records[example.row_id]
    assert isinstance(record, Tagged), "the task's records"
    return record.tags
