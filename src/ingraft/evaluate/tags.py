"""A tagger, judged on the words of the rows, those that it never saw included: what was cut away counts as untagged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import eq
from typing import TYPE_CHECKING, ClassVar

from torch.nn import functional as F

from ingraft.data.examples import IGNORED, Example
from ingraft.data.records import Tagged
from ingraft.data.tagged import OUTSIDE, names_entities, sentence
from ingraft.evaluate import weighted
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.measures import entities_of, of_tags
from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, floats
from ingraft.evaluate.outputs import outputs
from ingraft.evaluate.scorer import Asked, Done, Scorer

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row


@dataclass(frozen=True, kw_only=True, eq=False)
class TagOutcomes(Outcomes):
    """Of a tagger.

    Attributes:
        losses, counts: by row the summed loss of the words that the model saw, and how many these are.
        right, said: by row a tag for each word.
        entities: whether the tags of all rows mark entities.
    """

    losses: Sequence[float] = column()
    counts: Sequence[int] = column()
    right: Sequence[Sequence[str]] = column()
    said: Sequence[Sequence[str]] = column()
    entities: bool

    def metrics(self) -> dict[str, float]:
        loss = math.fsum(self.losses) / max(1, sum(self.counts))
        return {"loss": loss, **of_tags(self.right, self.said, self.entities)}

    def ratios(self) -> dict[str, Ratio]:
        hits = [sum(map(eq, right, said)) for right, said in zip(self.right, self.said, strict=True)]
        found = {
            "loss": (floats(self.losses), floats(self.counts)),
            "accuracy": (floats(hits), floats([*map(len, self.right)])),
        }
        if not self.entities:
            return found
        right, said = ([entities_of(tags) for tags in rows] for rows in (self.right, self.said))
        both = floats([len(one & other) for one, other in zip(right, said, strict=True)])
        right_N, said_N = (floats([*map(len, rows)]) for rows in (right, said))
        return found | {"precision": (both, said_N), "recall": (both, right_N), "f1": (2 * both, right_N + said_N)}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        if self.entities:
            return {}
        names = sorted({tag for rows in (self.right, self.said) for tags in rows for tag in tags})
        pairs = [list(zip(right, said, strict=True)) for right, said in zip(self.right, self.said, strict=True)]
        hits = [[one for one, other in row if one == other] for row in pairs]
        right_NK, said_NK, hits_NK = (
            floats([[tags.count(name) for name in names] for tags in rows]) for rows in (self.right, self.said, hits)
        )
        return {"macro_f1": weighted.macro_f1(right_NK, said_NK, hits_NK, times_RN)}


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
    ) -> tuple[list[float], list[int], list[list[str]]]:
        """By row the summed loss of its words in nats, how many these are, and the likeliest tag of each word that the row has."""
        losses, counts = [0.0] * len(examples), [0] * len(examples)
        found: list[list[str]] = [[] for _ in examples]
        nothing = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        for positions, logits_BTK, labels_BT in outputs(self.model, examples, self.pad_id, batch_size, poll):
            losses_BT = F.cross_entropy(logits_BTK.transpose(1, 2), labels_BT, reduction="none")  # 0 where ignored
            counts_B, losses_B = (labels_BT != IGNORED).sum(1), losses_BT.double().sum(1)
            columns = zip(positions, losses_B.tolist(), counts_B.tolist(), logits_BTK.argmax(-1).tolist(), strict=True)
            for position, loss, count, best in columns:
                example = examples[position]
                said = [nothing] * len(_words(part, example))
                for word, tag in zip(example.words or (), best, strict=False):  # behind the row is padding
                    if word >= 0:
                        said[word] = self.labels[tag]
                losses[position], counts[position], found[position] = loss, count, said
                if done is not None:
                    done(position, said)
        return losses, counts, found

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> TagOutcomes:
        del whole
        rows = data.parts[part]
        losses, counts, said = self.tags(rows, rows.examples, batch_size, poll)
        right = [_tags(rows, example) for example in rows.examples]
        entities = names_entities(tag for rows in (right, said) for tags in rows for tag in tags)
        return TagOutcomes(losses=losses, counts=counts, right=right, said=said, entities=entities)

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for example in examples:
            words = _words(part, example)
            found.append({"prompt": sentence(words), "expected": marked(words, _tags(part, example))})
        return found

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        said = self.tags(part, examples, poll=poll)[2]
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
