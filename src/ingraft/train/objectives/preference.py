"""Learning from preferences without a reward model: DPO and IPO from pairs and rankings, KTO from judged answers.

All answers of a row go through the policy in one forward, beside each other. What the reference says of them never changes, so it is worked out
once a row, when the row first turns up, and kept. Sums in other batches round otherwise, hence a row's numbers are always made beside the same
rows, those of its batch in the first epoch: a run that is stopped anywhere finds the same numbers again without a file of them.

KTO's point of reference (how far the policy is from the reference where nobody judged) is a mean over the whole effective batch, made without a
gradient ahead of the step. The loss is then a sum over rows again, and micro-batches change nothing.

Legend: S sequences, P pairs, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from ingraft.data import collate
from ingraft.data.examples import IGNORED, Example
from ingraft.data.preferences import Compared
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.loss import Poll, device_of
from ingraft.evaluate.modes import unnoticed
from ingraft.evaluate.preference import Pairs, dpo, ipo, kto, kto_baseline, pairs_of
from ingraft.evaluate.roles import as_reference
from ingraft.train.objectives.base import Objective

if TYPE_CHECKING:
    from ingraft.train.roofline import Meter


class PairsObjective(Objective):
    """A loss of pairs of answers. Abstract.

    A batch says beside its sequences which are to be told apart: `better`, `worse` (P,) int64 and `weight` (P,).

    Attributes:
        told: what the log calls the better answer's number, the worse one's, the share of pairs that are right, and the difference.
    """

    told: ClassVar[tuple[str, str, str, str]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
    )

    beside: ClassVar[frozenset[str]] = frozenset({"labels", "better", "worse", "weight", "reference"})

    def units(self, example: Example) -> int:
        return 1

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        pairs = pairs_of([cast(Compared, example).places for example in examples])
        device = device_of(self.model)
        told = {"better": pairs.better_P, "worse": pairs.worse_P, "weight": pairs.weight_P}
        return super().batch(examples) | {name: value.to(device) for name, value in told.items()}

    def compared(self, numbers_S: Tensor, batch: dict[str, Tensor]) -> Pairs:
        """The pairs of a batch, after taking note of what the log says of them.

        Args:
            numbers_S: what is compared.
        """
        pairs = Pairs(better_P=batch["better"], worse_P=batch["worse"], weight_P=batch["weight"])
        x_S = numbers_S.detach().float()
        margins_P, rows = pairs.margins(x_S), pairs.weight_P.sum()
        right_P = torch.where(margins_P == 0, 0.5, (margins_P > 0).float())
        for name, x_P in zip(self.told, (x_S[pairs.better_P], x_S[pairs.worse_P], right_P, margins_P), strict=True):
            self.notice(name, pairs.total(x_P), rows)
        return pairs


class RatioObjective(Objective):
    """What comparisons of a policy with its reference share. Abstract."""

    reference: ClassVar[bool] = True

    def begin(self, together: Sequence[Sequence[Example]] = ()) -> None:
        self._head = CausalHead(self.model)
        self._group_of = {row.row_id: group for group in together for row in group}
        self._known: dict[int, Tensor] = {}

    def ready(self, rows: Sequence[Example], size: int, meter: Meter | None = None, poll: Poll | None = None) -> None:
        for row in rows:
            if row.row_id in self._known:
                continue
            if poll is not None:
                poll()
            group = self._group_of.get(row.row_id, [row])
            with as_reference(self.model):
                found = self._looked_up([one for other in group for one in other.sequences], "reference", meter)
            parts = found.split([len(other.sequences) for other in group])
            self._known |= {other.row_id: part for other, part in zip(group, parts, strict=True)}

    def _looked_up(self, sequences: Sequence[Example], name: str, meter: Meter | None) -> Tensor:
        """(S,) log-probabilities, without a gradient, on the CPU."""
        batch = {key: x.to(device_of(self.model)) for key, x in collate(sequences, self.pad_id).items()}
        counted = nullcontext()
        if meter is not None:
            counted = meter.micro_batch(name, self.inputs(batch), sum(one.learned for one in sequences))
        with unnoticed(self.model), counted:
            return -self._head.by_row(batch).cpu()

    def ratios(self, batch: dict[str, Tensor]) -> Tensor:
        """(S,) log policy - log reference, in nats."""
        seen = self.inputs(batch) | {"labels": batch["labels"]}
        return -self._head.by_row(seen) - batch["reference"]

    def references(self, examples: Sequence[Example], first: bool = False) -> Tensor:
        """(S,) what the reference says of the sequences of these rows, or of the first of each."""
        found = [self._known[example.row_id] for example in examples]
        return torch.cat([part[:1] if first else part for part in found]).to(device_of(self.model))


class DpoObjective(RatioObjective, PairsObjective):
    """Direct preference optimisation."""

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return super().batch(examples) | {"reference": self.references(examples)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        ratios_S = self.ratios(batch)
        pairs = self.compared(self.losses.preference.beta * ratios_S, batch)
        self.notice("kl", ratios_S.detach().sum(), ratios_S.new_tensor(len(ratios_S)))
        return pairs.total(self.of(pairs, ratios_S, batch["labels"]))

    def of(self, pairs: Pairs, ratios_S: Tensor, labels_ST: Tensor) -> Tensor:
        """(P,) the loss of each pair."""
        del labels_ST
        return dpo(pairs.margins(ratios_S), self.losses.preference.beta, self.losses.preference.label_smoothing)


class IpoObjective(DpoObjective):
    """Identity preference optimisation: a margin by token, neither smaller nor larger than its goal."""

    def of(self, pairs: Pairs, ratios_S: Tensor, labels_ST: Tensor) -> Tensor:
        lengths_S = (labels_ST[:, 1:] != IGNORED).sum(dim=1)
        return ipo(pairs.margins(ratios_S / lengths_S), self.losses.preference.beta)


class KtoObjective(RatioObjective):
    """Kahneman-Tversky optimisation of answers that are judged one by one."""

    beside: ClassVar[frozenset[str]] = frozenset({"labels", "good", "reference"})

    def units(self, example: Example) -> int:
        return 1

    def begin(self, together: Sequence[Sequence[Example]] = ()) -> None:
        super().begin(together)
        self._baseline = torch.zeros(())

    def ready(self, rows: Sequence[Example], size: int, meter: Meter | None = None, poll: Poll | None = None) -> None:
        super().ready(rows, size, meter, poll)
        beside = [row for row in rows if len(row.sequences) > 1]
        ratios: list[Tensor] = []
        for start in range(0, len(beside), size):
            if poll is not None:
                poll()
            part = beside[start : start + size]
            unjudged = [row.sequences[1] for row in part]
            reference = torch.stack([self._known[row.row_id][1] for row in part])
            ratios.append(self._looked_up(unjudged, "baseline", meter) - reference)
        self._baseline = kto_baseline(torch.cat(ratios) if ratios else torch.zeros(0))
        self.notice("kl", self._baseline, torch.ones(()))

    def sequences(self, examples: Sequence[Example]) -> list[Example]:
        return [cast(Compared, example).own for example in examples]

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        good_B = torch.tensor([example.label == 1 for example in examples], device=device_of(self.model))
        return super().batch(examples) | {"good": good_B, "reference": self.references(examples, first=True)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        ratios_B, good_B, settings = self.ratios(batch), batch["good"], self.losses.preference
        for name, kind_B in (("rewards/chosen", good_B), ("rewards/rejected", ~good_B)):
            self.notice(name, settings.beta * ratios_B.detach()[kind_B].sum(), kind_B.sum())
        weights = settings.desirable_weight, settings.undesirable_weight
        return kto(ratios_B, good_B, self._baseline.to(ratios_B.device), settings.beta, *weights).sum()
