"""The answer that is given is the likeliest of all, over all windows of a context: against trying every span of every window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from ingraft.data.dataset import Part
from ingraft.data.examples import Example
from ingraft.data.records import Span
from ingraft.data.rows import Row
from ingraft.data.spans import ELSEWHERE
from ingraft.evaluate import spans
from ingraft.evaluate.spans import QaScorer


class Ids:
    """All of a tokenizer that a scorer asks for."""

    pad_token_id, eos_token_id = 0, 0


CONTEXT = "".join(chr(97 + n % 26) for n in range(40))


def windows(row: int, size: int, step: int) -> list[Example]:
    """A context of 40 tokens, one a character, behind a question of two; windows of `size` of them."""
    generator = torch.Generator().manual_seed(row)
    tokens = torch.randint(5, 60, (40,), generator=generator).tolist()
    found = []
    for start in range(0, 40 - size + step, step):
        at = range(start, min(start + size, 40))
        places = [*[ELSEWHERE] * 4, *[(n, n + 1) for n in at], ELSEWHERE]
        found.append(
            Example(input_ids=[2, 3, 4, 2, *[tokens[n] for n in at], 2], span=(0, 0), characters=places, row_id=row)
        )
        if at[-1] == 39:
            break
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    made = BertForQuestionAnswering(config).eval()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return made


@pytest.mark.parametrize(("size", "step"), [(40, 40), (12, 8), (9, 9)])
@pytest.mark.parametrize("longest", [3, 64])
def test_the_best_span_is_the_best_of_all(
    model: Any, size: int, step: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window that holds the whole context, windows that overlap, windows that do not; padded among others or alone."""
    monkeypatch.setattr(spans, "LONGEST", longest)
    rows = 6
    examples = [window for row in range(rows) for window in windows(row, size - row % 3 if size < 40 else 40, step)]
    record = Span(context=CONTEXT, question="??", answers=(("a", 0),))
    part = Part(
        rows=[Row(values={}, file="x", line=n) for n in range(rows)], records=[record] * rows, examples=examples
    )
    told: dict[int, str] = {}
    found, said = QaScorer(model, Ids()).spans(  # type: ignore[arg-type]
        part,
        range(rows),
        batch_size=5,
        done=lambda row, answer, start: told.update({row: CONTEXT[start:][: len(answer)]}),
    )
    losses = []
    for row in range(rows):
        best, answer = -math.inf, ""
        for window in (example for example in examples if example.row_id == row):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([window.input_ids]))
            start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            losses += [float((x.logsumexp(-1) - x[..., 0]).item()) / 2 for x in (out.start_logits, out.end_logits)]
            places = window.characters or []
            for i in range(len(places)):
                for j in range(i, min(i + longest, len(places))):
                    if ELSEWHERE not in (places[i], places[j]) and start[i] + end[j] > best + 1e-5:
                        best, answer = start[i] + end[j], CONTEXT[places[i][0] : places[j][1]]
        assert said[row] == answer == told[row]
    assert [len(row) for row in found] == [sum(one.row_id == row for one in examples) for row in range(rows)]
    assert sum(map(sum, found)) == pytest.approx(sum(losses), rel=1e-4)
