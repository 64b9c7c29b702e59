"""What rows are about: tasks and prompts, told or worked out, as the parts see them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ingraft import adapt
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import Method, MethodConfig, OutputPart, Site, SiteFacts, fresh
from ingraft.methods.registry import make_config
from ingraft.testing.subjects import SUBJECTS

SEEN: list[tuple[list[list[int]], list[int] | None]] = []
"""What the part below was told: prompt by row, tasks."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig(MethodConfig):
    """No options."""

    method: ClassVar[str] = "watch"


class Watch(OutputPart):
    """Changes nothing and notes what it is told."""

    reads_context = True

    def __init__(self, config: WatchConfig, facts: SiteFacts) -> None:
        del config, facts
        super().__init__()
        self.zero = fresh(1)
        torch.nn.init.zeros_(self.zero)

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        del x
        tasks = site.tasks()
        SEEN.append((site.prompt_mask(y).int().tolist(), None if tasks is None else tasks.tolist()))
        return y * (1.0 + self.zero)


METHOD = Method(
    name="watch", config=WatchConfig, part=Watch, sites=("block",), identity_at_init=True, count=lambda c, f: 1
)


@pytest.fixture(autouse=True)
def _watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own = registry.load
    monkeypatch.setattr(registry, "load", lambda name: METHOD if name == "watch" else own(name))
    SEEN.clear()
    yield
    SEEN.clear()


def _model(subject: str = "llama", name: str = "a") -> Any:
    model = SUBJECTS[subject].make_redrawn()
    adapt.attach(model, WatchConfig(layers_to_transform=(0,)), name)
    return model


IDS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
PROMPT = MASK.tolist()


def _run(model: Any, **options: Any) -> list[list[list[int]]]:
    SEEN.clear()
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, **options)
    return [prompt for prompt, _ in SEEN]


def _generate(model: Any, **options: Any) -> list[list[list[int]]]:
    SEEN.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*generation flags.*")
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **options}
        model.generate(input_ids=IDS, attention_mask=options.pop("attention_mask", MASK), **options)
    return [prompt for prompt, _ in SEEN]


def test_in_a_plain_forward_every_real_token_is_the_prompt() -> None:
    model = _model()
    assert _run(model) == [PROMPT]
    with torch.no_grad():
        SEEN.clear()
        model(input_ids=IDS)
    assert SEEN[0][0] == [[1] * 4] * 2


def test_what_is_told_holds_inside_the_block_and_no_longer() -> None:
    model = _model()
    told = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    with adapt.context(model, prompt=told, tasks=[3, 1]):
        assert _run(model) == [told.int().tolist()]
        assert SEEN[0][1] == [3, 1]
        with adapt.context(model, tasks=torch.tensor([2, 2])):
            assert _run(model) == [told.int().tolist()], "what is left out holds as before"
            assert SEEN[0][1] == [2, 2]
    assert _run(model) == [PROMPT]
    assert SEEN[0][1] is None


def test_tokens_behind_what_is_told_are_the_answers() -> None:
    model = _model()
    with adapt.context(model, prompt=torch.ones(2, 3, dtype=torch.bool)):
        assert _run(model) == [[[1, 1, 1, 0]] * 2]


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("padded", [True, False])
def test_generate_knows_where_its_prompt_ends(cache: str, padded: bool) -> None:
    """Also without padding, where transformers drops the mask altogether."""
    model = _model()
    options: dict[str, Any] = {"use_cache": False} if cache == "none" else {}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    mask = MASK if padded else torch.ones_like(MASK)
    prompt = mask.tolist()
    seen = _generate(model, attention_mask=mask, **options)
    if cache == "none":
        assert seen == [[[*row, *[0] * step] for row in prompt] for step in range(3)]
    else:
        assert seen == [prompt, [[0], [0]], [[0], [0]]]
    assert _run(model) == [PROMPT], "generate leaves nothing behind"


def test_beams_repeat_rows_with_what_they_are_about() -> None:
    model = _model()
    with adapt.context(model, tasks=[3, 1]):
        seen = _generate(model, num_beams=2)
    assert seen[0] == [PROMPT[0]] * 2 + [PROMPT[1]] * 2
    assert SEEN[0][1] == [3, 3, 1, 1]
    assert seen[1] == [[0]] * 4


def test_a_prompt_told_beforehand_goes_before_what_generate_works_out() -> None:
    model = _model()
    told = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    with adapt.context(model, prompt=told):
        assert _generate(model)[0] == told.int().tolist()


def test_a_cache_filled_in_two_calls_by_hand() -> None:
    """The tokens of the second call are an answer, unless one says that they are not."""
    model = _model()

    def twice() -> list[list[list[int]]]:
        SEEN.clear()
        with torch.no_grad():
            first = model(input_ids=IDS[:, :3], attention_mask=MASK[:, :3], use_cache=True)
            model(input_ids=IDS[:, 3:], attention_mask=MASK, past_key_values=first.past_key_values)
        return [prompt for prompt, _ in SEEN]

    assert twice() == [[[1, 1, 1], [0, 0, 1]], [[0], [0]]]
    with adapt.context(model, prompt=MASK):
        assert twice() == [[[1, 1, 1], [0, 0, 1]], [[1], [1]]]


def test_each_group_of_rows_sees_its_own() -> None:
    model = _model()
    adapt.attach(model, WatchConfig(layers_to_transform=(0,)), "b")
    with adapt.rows(model, ["a", "b"]), adapt.context(model, tasks=[3, 1]):
        seen = _run(model)
    assert seen == [[PROMPT[0]], [PROMPT[1]]]
    assert [tasks for _, tasks in SEEN] == [[3], [1]]


def test_virtual_tokens_are_no_prompt_of_the_row() -> None:
    model = _model()
    adapt.attach(model, make_config("prompt", {"num_virtual_tokens": 2}), "virtual")
    adapt.activate(model, "a", "virtual")
    assert _run(model) == [[[0, 0, *row] for row in PROMPT]]
    assert _generate(model)[1:] == [[[0], [0]]] * 2


def test_in_an_encoder_decoder_the_start_token_is_the_decoders_prompt() -> None:
    model = _model("t5")
    SEEN.clear()
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=torch.tensor([[0, 4, 5], [0, 6, 7]]))
    assert [prompt for prompt, _ in SEEN] == [PROMPT, [[1, 0, 0], [1, 0, 0]]]
    seen = _generate(model)
    assert seen == [PROMPT, [[1], [1]], [[0], [0]], [[0], [0]]]
    assert _generate(model, use_cache=False)[1:] == [[[1, *[0] * step]] * 2 for step in range(3)]


def test_pictures_and_plain_modules_are_all_prompt_unless_told() -> None:
    model = _model("vit")
    with torch.no_grad():
        model(**SUBJECTS["vit"].batch(2))
    assert SEEN[0][0] == [[1] * 5] * 2
    plain = SUBJECTS["linear"].make_redrawn()
    adapt.attach(plain, WatchConfig(target_modules=("second",)), "a")
    SEEN.clear()
    batch = SUBJECTS["linear"].batch(2)
    plain(**batch)
    with adapt.context(plain, prompt=torch.tensor([[1, 0, 0], [1, 1, 0]])):
        plain(**batch)
    assert [prompt for prompt, _ in SEEN] == [[[1] * 3] * 2, [[1, 0, 0], [1, 1, 0]]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_what_the_forward_pass_was_told(reentrant: bool) -> None:
    model = _model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    told = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]])
    with adapt.context(model, prompt=told, tasks=[3, 1]):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, attention_mask=MASK).logits.sum()
    loss.backward()
    assert [prompt for prompt, _ in SEEN] == [told.tolist()] * 2
    assert [tasks for _, tasks in SEEN] == [[3, 1]] * 2


def test_what_cannot_be_meant_is_refused() -> None:
    model = _model()
    with pytest.raises(IngraftError) as caught, adapt.context(model, tasks=torch.tensor([1.0]), prompt=torch.ones(3)):
        pass
    assert len(caught.value.problems) == 3
    with pytest.raises(IngraftError, match="3 rows"), adapt.context(model, tasks=[1, 2, 3]):
        _run(model)


def test_code_run_on_one_groups_rows_is_told_of_these_alone() -> None:
    """Beams repeat rows side by side; what all rows share stays."""
    from ingraft.adapt.context import Context, Tokens
    from ingraft.adapt.rows import Call

    context = Context(tasks=torch.tensor([7, 8, 9]), prompt=torch.eye(3, dtype=torch.bool))
    real = torch.arange(6)[:, None] % 2 == 0
    call = Call(rows=(("a",), ("b",), ("a",)), context=context, tokens=Tokens(count=1, real=real))
    seen = call.of_group(call.groups[0])
    assert seen.context.tasks is not None and seen.context.prompt is not None and seen.tokens is not None
    assert seen.context.tasks.tolist() == [7, 9]
    assert seen.context.prompt.int().tolist() == [[1, 0, 0], [0, 0, 1]]
    assert seen.tokens.real is not None and seen.tokens.real.flatten().tolist() == [True, False, True, False]
