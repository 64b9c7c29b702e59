"""The language-model head, applied only where something is asked.

A vocabulary of 49,152 makes the head's output the largest tensor of a run: 8 rows of 256 tokens are 400 MB in float32, several times over
with the gradient. In instruction tuning most positions are prompt, whose logits nobody looks at. So the head runs on the asked positions
only, and for the loss of a frozen head in pieces whose gradient is computed in the forward pass: logits of one piece are all that exists.

No architecture is known by name here. The model's own forward runs as always (adapters, prompts and shared parts act in it); a hook on its
output embedding takes the hidden states that the model hands to its head. What a model does behind its head (soft cap, scale) is found by
comparing with its own logits on a short probe; a model that none of the candidates explains keeps its plain logits.

Legend: B rows, T positions, N asked positions, D width, V vocabulary, C positions in a piece.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.adapt import context
from ingraft.adapt.context import before_answer
from ingraft.adapt.control import control_of, host_state
from ingraft.adapt.swap import original_class
from ingraft.adapt.weights import kind_of
from ingraft.errors import IngraftError
from ingraft.evaluate.modes import unnoticed

log = logging.getLogger(__name__)

PIECE = 128
"""Positions whose logits exist at once: 25 MB in float32 at a vocabulary of 49,152. Blocks of twice that size are given back to the system by
glibc whenever they are freed, and mapping their pages anew took longer than the products (docs/lab-notes.md)."""


@dataclass(frozen=True, kw_only=True)
class Behind:
    """What a model does to its head's output: `scale * logits`, then `cap * tanh(logits / cap)` if cap is set."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, z: Tensor) -> Tensor:
        """In place, on float32 logits."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What one forward left to be read: the states the head was handed, or the model's own logits where the head is not applied by pieces.

    Attributes:
        states_BTX: (B, T, D), or the logits (B, T, V) if `behind` is None.
        behind, weight_VD, bias_V: the head.
    """

    states_BTX: Tensor
    behind: Behind | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None

    def loss(self, labels_BT: Tensor) -> Tensor:
        """The summed negative log-likelihood (nats) of the learned tokens. Differentiable, but for the head of which it is applied by pieces."""
        rows_N, at_N, targets_N = learned(labels_BT)
        x_NX = self.states_BTX[rows_N, at_N]
        if self.behind is None or self.weight_VD is None:
            return F.cross_entropy(x_NX.float(), targets_N, reduction="sum")
        return cast(Tensor, _PiecewiseLoss.apply(x_NX, self.weight_VD, self.bias_V, targets_N, self.behind)[0])

    def by_row(self, labels_BT: Tensor) -> Tensor:
        """(B,) the summed negative log-likelihood (nats) of each row's learned tokens. Differentiable, as `loss`."""
        return self.by_token(labels_BT).sum(dim=1)

    def by_token(self, labels_BT: Tensor) -> Tensor:
        """(B, T) the negative log-likelihood (nats) of the token at t + 1 where that is learned, else 0. Differentiable, as `loss`."""
        losses_N, rows_N = self.losses(labels_BT)
        at_N = learned(labels_BT)[1]
        # Each into a place of its own and not added up as they come, which on a GPU is in another order every time.
        return losses_N.new_zeros(labels_BT.shape).index_put((rows_N, at_N), losses_N)

    def losses(self, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Per learned token its negative log-likelihood in nats (N,) and its row (N,). Differentiable, as `loss`."""
        rows_N, at_N, targets_N = learned(labels_BT)
        x_NX = self.states_BTX[rows_N, at_N]
        if self.behind is None or self.weight_VD is None:
            return F.cross_entropy(x_NX.float(), targets_N, reduction="none"), rows_N
        return _PiecewiseLoss.apply(x_NX, self.weight_VD, self.bias_V, targets_N, self.behind)[1], rows_N

    def logits(self, rows_N: Tensor, at_N: Tensor) -> Tensor:
        """Float32 logits (N, V) at the given positions."""
        x_NX = self.states_BTX[rows_N, at_N]
        if self.behind is None or self.weight_VD is None:
            return x_NX.float()
        return self.behind.apply_(F.linear(x_NX, self.weight_VD, self.bias_V).float())


class CausalHead:
    """How to get losses and logits of chosen positions out of a causal language model. Cheap to make: one probe of a few tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = cast("nn.Module | None", cast(Any, model).get_output_embeddings())
        with unnoticed(model):  # dropout would make the probe's two passes differ
            self._behind = self._probe()

    @property
    def by_pieces(self) -> bool:
        """Whether the loss to train on is computed in pieces from hidden states, rather than from the model's own logits. Not with a trained
        head: pieces give it no gradient."""
        return self._behind is not None and not any(p.requires_grad for p in cast(nn.Module, self._head).parameters())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed negative log-likelihood (nats) of the batch's learned tokens; `labels` (B, T) holds -100 elsewhere. Differentiable."""
        return self._see(batch, self.by_pieces).loss(batch["labels"])

    def by_row(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) the same for each row of the batch. Differentiable."""
        return self._see(batch, self.by_pieces).by_row(batch["labels"])

    def by_token(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T) by token, see `Seen.by_token`. Differentiable."""
        return self._see(batch, self.by_pieces).by_token(batch["labels"])

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, D) the hidden states that the model hands to its head. Differentiable."""
        return self._hidden(batch)

    @torch.no_grad()
    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per learned token its negative log-likelihood in nats (N,) and its row (N,)."""
        return self.see(batch).losses(batch["labels"])

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor], rows_N: Tensor, at_N: Tensor) -> Tensor:
        """Float32 logits (N, V) at the given positions."""
        return self.see(batch).logits(rows_N, at_N)

    @torch.no_grad()
    def see(self, batch: dict[str, Tensor]) -> Seen:
        """One forward, from which losses and logits can be read as often as wanted."""
        return self._see(batch, self._behind is not None)

    def _see(self, batch: dict[str, Tensor], by_pieces: bool) -> Seen:
        if not by_pieces:
            logits_BTV = self._run(batch).logits
            return Seen(states_BTX=logits_BTV[:, -self.positions(batch) :])
        weight_VD, bias_V = self._matrix()
        return Seen(states_BTX=self._hidden(batch), behind=self._behind, weight_VD=weight_VD, bias_V=bias_V)

    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight (unpacked for the purpose, where it is kept packed) and bias."""
        head = cast(nn.Linear, self._head)
        kind = kind_of(head)
        assert kind is not None
        return cast(Tensor, kind.weight_of(head)), head.bias

    def positions(self, batch: dict[str, Tensor]) -> int:
        """How many positions of a row the head is applied to."""
        return batch["input_ids"].shape[1]

    def trial(self, ids_1T: Tensor) -> dict[str, Tensor]:
        """A batch of these tokens, to see what the model makes of them."""
        return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}

    def _run(self, batch: dict[str, Tensor]) -> Any:
        """One forward, in which adapters know the prompt where there are labels to tell it from."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if "labels" not in batch or control_of(self._model) is None:
            return self._model(**inputs, use_cache=False)
        with context(self._model, prompt=prompts(batch)):
            return self._model(**inputs, use_cache=False)

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """The hidden states (B, T, D) that the model hands to its head, which itself gets to see one position a row."""
        seen: list[Tensor] = []

        def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            del module
            seen.append(args[0])
            # Contiguous, or torch multiplies row by row with as many copies of a frozen head: 0.6 s a call at 16 rows.
            return (args[0][:, -1:].contiguous(), *args[1:])

        assert self._head is not None
        handle = self._head.register_forward_pre_hook(take)
        try:
            self._run(batch)
        finally:
            handle.remove()
        # Virtual tokens, where an adapter has some, stand in front of the real ones.
        return seen[0][:, -self.positions(batch) :]

    def _probe(self) -> Behind | None:
        """The candidate that reproduces the model's own logits, or None."""
        head = self._head
        kind = kind_of(head) if head is not None else None
        if head is None or kind is None or kind.name != "linear":
            return None
        if host_state(head) is not None:
            return None  # an adapted head: its own forward is wanted
        vocabulary, width = kind.shape_of(head)
        weight_VD, bias_V = self._matrix()
        config = cast(Any, self._model).config.get_text_config()
        # What the config declares comes first: on small logits a soft cap looks like nothing at all.
        caps = dict.fromkeys([getattr(config, "final_logit_softcapping", None), None])
        declared = [getattr(config, "logit_scale", None), _inverse(getattr(config, "logits_scaling", None))]
        scales = [scale for scale in declared if scale is not None] + [1.0]
        ids = torch.arange(1, 9, device=weight_VD.device).clamp(max=vocabulary - 1)[None]
        inputs = self.trial(ids)
        try:
            wanted = self._run(inputs).logits[0, -8:].float()
            h_BTD = self._hidden(inputs)
            if h_BTD.shape != (1, 8, width):
                raise ValueError("hidden states of another shape")
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            log.info("The loss is computed from the model's whole logits: %s.", " ".join(str(error).split())[:120])
            return None
        plain = F.linear(h_BTD[0], weight_VD, bias_V).float()
        tolerance = 1e-4 if weight_VD.dtype == torch.float32 else 0.05
        for scale in scales:
            for cap in caps:
                behind = Behind(scale=float(scale), cap=None if cap is None else float(cap))
                if torch.allclose(behind.apply_(plain.clone()), wanted, rtol=tolerance, atol=tolerance):
                    return behind
        log.info("The loss is computed from the model's whole logits: what it does behind its head is not known.")
        return None


def learned(labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and target of every learned token: position t predicts the label at t + 1."""
    rows_N, at_N = torch.nonzero(labels_BT[:, 1:] != -100, as_tuple=True)
    return rows_N, at_N, labels_BT[rows_N, at_N + 1]


def prompts(batch: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: the tokens before the first learned one; all real tokens of plain text, where nothing but the text is learned."""
    return before_answer(batch["labels"], batch["attention_mask"])


def _inverse(x: float | None) -> float | None:
    return 1.0 / x if x else None


class PairHead(CausalHead):
    """The same for an encoder that reads `input_ids` and a decoder that writes `labels`, which hold a -100 in front."""

    def positions(self, batch: dict[str, Tensor]) -> int:
        return batch["decoder_attention_mask"].shape[1]

    def trial(self, ids_1T: Tensor) -> dict[str, Tensor]:
        labels_1T = F.pad(ids_1T, (1, 0), value=-100)
        return {**super().trial(ids_1T), "labels": labels_1T, "decoder_attention_mask": torch.ones_like(ids_1T)}

    def _run(self, batch: dict[str, Tensor]) -> Any:
        """One forward. All that the encoder reads is the prompt, as adapters take it where nothing is said."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        begun = cast(Any, self._model).prepare_decoder_input_ids_from_labels(labels=batch["labels"][:, 1:])
        return self._model(**inputs, decoder_input_ids=begun, use_cache=False)


def head_of(model: nn.Module) -> CausalHead:
    """The head of a model that writes, by itself or behind an encoder.

    Raises:
        IngraftError: an encoder-decoder of which transformers does not say how a given answer is written.
    """
    if not getattr(cast(Any, model).config, "is_encoder_decoder", False):
        return CausalHead(model)
    if getattr(model, "prepare_decoder_input_ids_from_labels", None) is None:
        raise IngraftError(
            f"{original_class(model).__name__}: transformers does not say what its decoder is given to write an answer; use another base."
        )
    return PairHead(model)


class _PiecewiseLoss(torch.autograd.Function):
    """Cross entropy through a frozen head, summed and by token, piece by piece; the gradient to the hidden states is made along with the loss.

    Of one token that is a gradient for its loss alone, so whatever is computed from the losses later only weighs it."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, behind: Behind
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(h_ND) if wanted else None
        losses_N = torch.empty(h_ND.shape[0], dtype=torch.float32, device=h_ND.device)
        room = h_ND.new_empty(min(PIECE, h_ND.shape[0]), weight_VD.shape[0], dtype=torch.float32)
        narrow = room if h_ND.dtype == torch.float32 else torch.empty_like(room, dtype=h_ND.dtype)
        for start in range(0, h_ND.shape[0], PIECE):
            piece = slice(start, start + PIECE)
            targets_C = targets_N[piece, None]
            z_CV, narrow_CV = room[: len(targets_C)], narrow[: len(targets_C)]
            if bias_V is None:
                torch.mm(h_ND[piece], weight_VD.T, out=narrow_CV)
            else:
                torch.addmm(bias_V, h_ND[piece], weight_VD.T, out=narrow_CV)
            behind.apply_(z_CV if narrow is room else z_CV.copy_(narrow_CV))
            bend_CV = None
            if wanted and behind.cap is not None:
                bend_CV = 1 - (z_CV / behind.cap).square_()  # the derivative of the soft cap
            normaliser_C1 = torch.logsumexp(z_CV, dim=-1, keepdim=True)
            losses_N[piece] = (normaliser_C1 - z_CV.gather(1, targets_C)).squeeze(1)
            if grad_ND is not None:
                p_CV = z_CV.sub_(normaliser_C1).exp_()
                p_CV.scatter_add_(1, targets_C, torch.full_like(normaliser_C1, -1.0))
                if bend_CV is not None:
                    p_CV.mul_(bend_CV)
                if behind.scale != 1.0:
                    p_CV.mul_(behind.scale)
                torch.mm(p_CV if narrow is room else narrow_CV.copy_(p_CV), weight_VD, out=grad_ND[piece])
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        ctx.set_materialize_grads(False)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        of_sum, of_each_N = grads
        if of_each_N is None:
            return grad_ND * of_sum, None, None, None, None
        weight_N = of_each_N if of_sum is None else of_each_N + of_sum
        return (grad_ND * weight_N[:, None]).to(grad_ND.dtype), None, None, None, None
