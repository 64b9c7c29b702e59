"""`check_method` is for methods of other packages: it lets a sound one pass and names every law that a broken one breaks."""

from __future__ import annotations

import pytest
from torch import Tensor

from ingraft.methods.contract import Site
from ingraft.methods.lora import LoRA, LoraConfig
from ingraft.testing import SUBJECTS, Row, all_laws, check_method, checks
from ingraft.testing.matrix import lines
from ingraft.testing.table import row

LINEAR = [SUBJECTS["linear"]]


def test_a_sound_method_passes() -> None:
    row = Row(config=LoraConfig(r=2), dropout="lora_dropout")
    assert check_method(row, subjects=LINEAR, numbers=[1, 2, 3, 5, 13]) == 11
    assert check_method(LoraConfig(r=2), subjects=LINEAR, numbers=[21]) == 1


def test_a_broken_method_is_told_every_law_it_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(self: LoRA, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return site.low_rank(x, y, self.lora_A, self.lora_B, 2 * self.scale)  # twice what `weight` says

    monkeypatch.setattr(LoRA, "after", after)
    with pytest.raises(AssertionError) as caught:
        check_method(LoraConfig(r=2), subjects=LINEAR, numbers=[1, 2, 5, 8, 21])
    text = str(caught.value)
    assert "law 2, merged_is_active_float32, on linear" in text
    assert "law 5, shortcut_is_the_general_path, on linear" in text
    assert "law 1," not in text and "law 8," not in text and "law 21," not in text


def test_an_error_of_the_method_is_a_broken_law(monkeypatch: pytest.MonkeyPatch) -> None:
    def weight(self: LoRA, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(LoRA, "weight", weight)
    with pytest.raises(AssertionError, match="RuntimeError: no such thing"):
        check_method(LoraConfig(r=2), subjects=LINEAR, numbers=[2])


@pytest.mark.parametrize("method", ["lokr", "trainable-tokens", "reft", "p-tuning"])
def test_every_number_of_a_law_is_tried_with_a_method_every_day(method: str) -> None:
    """Whatever waits for `study` of it, also of a method that linear layers refuse."""
    subjects = [SUBJECTS[name] for name in ("linear", "embedding", "llama", "linear-nf4")]
    found = list(checks([row(method)], subjects))
    assert {each.law.number for each in found} == {each.law.number for each in found if each.study is None}


def test_every_law_states_itself_and_every_number_is_there() -> None:
    numbers = {law.number for law in all_laws()}
    assert numbers == {*range(14), *range(16, 24)}
    for law in all_laws():
        assert len(law.statement) > 40, law.name


def test_no_hole_without_a_reason() -> None:
    found = list(checks(with_holes=True))
    assert len({str(check) for check in found}) == len(found), "two checks of one name"
    for check in found:
        assert check.hole is None or len(check.hole) > 10, str(check)


def test_the_matrix_shows_what_was_tried_what_failed_and_why_not() -> None:
    text = "\n".join(
        lines([("lora", 1, "linear", "held"), ("houlsby", 2, "linear", "refused"), ("lora", 3, "linear", "broken")])
    )
    assert "1 FAIL" in text and "0+1r" in text and "later" in text
    assert "not part of this session" in text
