"""Texts that belong together get vectors that are near each other: a loss that every row of the step has a part in.

Among the wrong texts for a row are those of all other rows, so the loss is no sum over rows, and micro-batches by themselves would have another one:
fewer wrong texts, an easier question. So the vectors of the whole effective batch are made first, micro-batch by micro-batch and without a graph; the
loss of all of them gives each vector its gradient; then each micro-batch goes through again, and is pulled along that gradient (GradCache, Gao et
al. 2021, https://arxiv.org/abs/2101.06983). That is the gradient of the whole, for a second forward pass, and 8 rows at once and 2 rows four times are the
same step. Dropout is a function of step and row, so both passes drop the same. A step whose rows all go through at once needs no first pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ingraft import adapt
from ingraft.adapt.control import require_control
from ingraft.data import row_ids
from ingraft.data.examples import Example
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.similarity import Layout, embeddings, layout, loss_of, matched
from ingraft.train.objectives.base import Objective

if TYPE_CHECKING:
    from ingraft.train.roofline import Meter


class EmbedObjective(Objective):
    """InfoNCE of pairs, CoSENT of numbers, over the whole effective batch."""

    beside: ClassVar[frozenset[str]] = frozenset({"labels", "gradient", "share"})
    _whole: Layout | None = None
    _gradients: dict[int, Tensor]
    _share: float = 0.0

    def units(self, example: Example) -> int:
        return 1

    def ready(self, rows: Sequence[Example], size: int, meter: Meter | None = None, poll: Poll | None = None) -> None:
        where, self._gradients = layout(matched(rows)), {}
        self._whole = where if size >= len(rows) else None
        if self._whole is not None:
            return
        step, found = int(require_control(self.model).call.step), list[Tensor]()
        for start in range(0, len(rows), size):
            if poll is not None:
                poll()
            micro = rows[start : start + size]
            adapt.dropout_step(self.model, step, row_ids(self.sequences(micro)))
            inputs = self.inputs(super().batch(micro))
            with torch.no_grad():
                if meter is None:
                    found.append(embeddings(self.model, inputs))
                else:
                    with meter.micro_batch("vectors", inputs, 0):
                        found.append(embeddings(self.model, inputs))
        e_SD = torch.cat(found).requires_grad_()
        total = loss_of(e_SD, where, self.losses.embed)
        (gradient_SD,) = torch.autograd.grad(total, e_SD)
        parts = gradient_SD.split([len(row.sequences) for row in rows])
        twice: dict[
            int, list[Tensor]
        ] = {}  # a row that stands twice in the step has the same vectors both times: each takes half of both gradients
        for row, part in zip(rows, parts, strict=True):
            twice.setdefault(row.row_id, []).append(part)
        self._gradients = {row_id: torch.stack(found).mean(0) for row_id, found in twice.items()}
        self._share = total.item() / len(rows)

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = super().batch(examples)
        if self._whole is not None:
            return batch
        gradient_SD = torch.cat([self._gradients[example.row_id] for example in examples])
        return batch | {"gradient": gradient_SD, "share": gradient_SD.new_tensor(self._share * len(examples))}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        e_SD = embeddings(self.model, self.inputs(batch))
        if self._whole is not None:
            return loss_of(e_SD, self._whole, self.losses.embed)
        pull = (e_SD * batch["gradient"]).sum()
        return pull + (batch["share"] - pull).detach()  # the gradient of one, the value of the other
