"""Row-wise scores, their error bars, choices and answers, each against a plain computation of the same thing."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ingraft.data.examples import Example
from ingraft.data.records import Labelled
from ingraft.data.rows import Row
from ingraft.errors import IngraftError
from ingraft.evaluate import (
    SCORERS,
    ChoiceRow,
    LossScores,
    choice_rows,
    generate,
    paired_difference,
    score_along,
    score_choices,
    score_classes,
    score_loss,
    scorer_of,
)
from ingraft.evaluate.writing import outcomes_of_text


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def sequences(n: int, seed: int = 0) -> list[Example]:
    rng = numpy.random.default_rng(seed)
    found = []
    for number in range(n):
        ids = rng.integers(3, 60, int(rng.integers(4, 30))).tolist()
        start = int(rng.integers(1, len(ids)))
        found.append(Example(input_ids=ids, labels=[-100] * start + ids[start:], row_id=number))
    return found


def test_losses_are_those_of_each_row_alone(llama: Any) -> None:
    examples = sequences(11)
    scores = score_loss(llama, examples, pad_id=0, batch_size=4)
    for example, total, count in zip(examples, scores.sums, scores.counts, strict=True):
        assert example.labels is not None
        out = llama(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels]))
        assert count == sum(label != -100 for label in example.labels)
        assert total / count == pytest.approx(out.loss.item(), rel=1e-4)
    assert scores.loss == pytest.approx(sum(scores.sums) / sum(scores.counts))
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))


def test_the_same_call_gives_the_same_bits_and_leaves_modes_alone(llama: Any) -> None:
    examples = sequences(9)
    llama.model.layers[0].train()
    first = score_loss(llama, examples, pad_id=0)
    assert llama.model.layers[0].training
    assert not llama.model.layers[1].training
    llama.eval()
    assert score_loss(llama, examples, pad_id=0) == first


def test_polling_can_stop(llama: Any) -> None:
    class Stop(Exception):
        pass

    def poll() -> None:
        raise Stop

    with pytest.raises(Stop):
        score_loss(llama, sequences(3), pad_id=0, poll=poll)


def test_the_standard_error_of_a_difference_is_that_of_resampling() -> None:
    rng = numpy.random.default_rng(0)
    counts = rng.integers(1, 50, 400)
    before = rng.normal(2.0, 0.5, 400) * counts
    after = before - rng.normal(0.1, 0.3, 400) * counts
    a = LossScores(sums=tuple(before.tolist()), counts=tuple(counts.tolist()))
    b = LossScores(sums=tuple(after.tolist()), counts=tuple(counts.tolist()))
    difference, error = paired_difference(a, b)
    assert difference == pytest.approx(b.loss - a.loss)
    draws = rng.integers(0, 400, (2000, 400))
    resampled = (after - before)[draws].sum(1) / counts[draws].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.1)
    assert paired_difference(a, a) == (0.0, 0.0)


def test_differences_need_the_same_rows() -> None:
    with pytest.raises(IngraftError, match="same rows"):
        paired_difference(LossScores(sums=(1.0,), counts=(1,)), LossScores(sums=(1.0,), counts=(2,)))
    with pytest.raises(IngraftError, match="at least two"):
        paired_difference(LossScores(sums=(1.0,), counts=(1,)), LossScores(sums=(1.0,), counts=(1,)))


def likelihood(model: Any, prompt: list[int], answer: tuple[int, ...]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("choices", [((5,), (6,), (7,)), ((5,), (6, 8), (7, 9, 10))], ids=["single", "several"])
def test_choice_scores_are_likelihoods(llama: Any, choices: tuple[tuple[int, ...], ...]) -> None:
    rows = [ChoiceRow(prompt=e.input_ids, choices=choices, answer=n % 3, row_id=n) for n, e in enumerate(sequences(7))]
    found = score_choices(llama, rows, pad_id=0, batch_size=3)
    for row, scores in zip(rows, found.scores, strict=True):
        wanted = [likelihood(llama, row.prompt, choice) for choice in row.choices]
        assert scores == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    best = [max(range(3), key=lambda k, s=s: s[k]) for s in found.scores]
    assert found.accuracy == sum(p == n % 3 for n, p in enumerate(best)) / 7
    per_token = score_choices(llama, rows, pad_id=0, batch_size=3, normalise="tokens")
    for row, whole, each in zip(rows, found.scores, per_token.scores, strict=True):
        assert each == pytest.approx([s / len(c) for s, c in zip(whole, row.choices, strict=True)])


@pytest.mark.parametrize("choices", [((5,), (6,), (7,)), ((5,), (6, 8))], ids=["single", "several"])
def test_choices_are_scored_along_with_the_loss(llama: Any, choices: tuple[tuple[int, ...], ...]) -> None:
    """The same figures as one after the other, and where each answer is a token, no forward of their own."""
    prompts = sequences(9)
    examples = [
        Example(input_ids=[*e.input_ids, 5, 2], labels=[-100] * len(e.input_ids) + [5, 2], row_id=e.row_id)
        for e in prompts
    ]
    rows = [ChoiceRow(prompt=e.input_ids, choices=choices, answer=0, row_id=e.row_id) for e in reversed(prompts[1:])]
    calls: list[Any] = []
    handle = llama.register_forward_hook(lambda *args: calls.append(args))
    losses, scores = score_along(llama, examples, rows, pad_id=0, batch_size=4)
    handle.remove()
    along = 3 + 2  # one forward a batch, and the probe of the head
    if len(choices) == 3:
        assert len(calls) == along
    else:
        assert len(calls) > along
    assert losses.sums == score_loss(llama, examples, pad_id=0, batch_size=4).sums
    wanted = score_choices(llama, rows, pad_id=0, batch_size=4)
    assert scores.answers == wanted.answers
    for mine, other in zip(scores.scores, wanted.scores, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_an_example_that_is_another_row_is_not_read_for_it(llama: Any) -> None:
    (example,) = sequences(1)
    asked = Example(input_ids=[*example.input_ids, 5], labels=[-100] * len(example.input_ids) + [5], row_id=0)
    row = ChoiceRow(prompt=[*example.input_ids[:-1], 60], choices=((5,), (6,)), answer=0, row_id=0)
    _, scores = score_along(llama, [asked], [row], pad_id=0)
    assert scores.scores == score_choices(llama, [row], pad_id=0).scores


WORDS = ["<unk>", "<s>", "</s>", "<pad>", "user", "assistant", "good", "bad", "very", "a", "film", "was"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    return made


def test_labels_become_choices_as_training_encodes_them(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        Labelled(text="a good film", text2=None, label="good"),
        Labelled(text="a film was bad", text2=None, label="very bad"),
        Labelled(text="film " * 40, text2=None, label="good"),
    ]
    rows = [Row(values={}, file="f", line=n, reader="jsonl") for n in range(3)]
    found = choice_rows(records, rows, tokenizer, ["good", "very bad"], max_length=32)
    assert [row.row_id for row in found] == [0, 1, 2]
    assert [row.answer for row in found] == [0, 1, 0]
    longest = max(len(choice) for choice in found[2].choices)
    assert 32 - 2 - longest <= len(found[2].prompt) <= 32 - longest, (
        "a long prompt loses its middle, the answers stay whole"
    )
    assert [WORDS[token] for token in found[2].prompt[-2:]] == ["</s>", "assistant"]
    assert [WORDS[token] for token in found[0].prompt] == ["user", "a", "good", "film", "</s>", "assistant"]
    assert [[WORDS[token] for token in choice] for choice in found[0].choices] == [["good"], ["very", "bad"]]


def test_answers_do_not_depend_on_their_batch(llama: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [[4, 9, 10], [4, 6, 7, 8, 9, 10, 11], [5], [4, 11, 9, 8]]
    together = generate(llama, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    alone = [generate(llama, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert any(together)


@pytest.mark.filterwarnings("error")
def test_greedy_is_greedy_whatever_the_model_says(llama: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = generate(llama, tokenizer, [[4, 9, 10]], max_new_tokens=6)
    llama.generation_config.do_sample, llama.generation_config.temperature = True, 5.0
    try:
        assert generate(llama, tokenizer, [[4, 9, 10]], max_new_tokens=6) == plain
        assert llama.generation_config.do_sample is True
    finally:
        llama.generation_config.do_sample, llama.generation_config.temperature = None, None


def test_the_loss_of_classes_equals_scikit_learns() -> None:
    from sklearn.metrics import log_loss

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    model = BertForSequenceClassification(config)
    model.classifier.weight.data.normal_()
    examples = [Example(input_ids=e.input_ids, label=e.row_id % 3, row_id=e.row_id) for e in sequences(40)]
    scores = score_classes(model, examples, pad_id=0, batch_size=7)
    assert model.training
    assert scores.labels == tuple(n % 3 for n in range(40))
    assert scores.loss == pytest.approx(log_loss(scores.labels, numpy.array(scores.probabilities)), rel=1e-4)
    alone = score_classes(model, examples[3:4], pad_id=0)
    assert alone.losses[0] == pytest.approx(scores.losses[3], rel=1e-4)


def test_evaluate_names_its_metrics(llama: Any) -> None:
    examples = sequences(5)
    choices = [ChoiceRow(prompt=e.input_ids, choices=((5,), (6,)), answer=0, row_id=e.row_id) for e in examples]
    plain = outcomes_of_text(llama, examples, 0).metrics()
    assert set(plain) == {"loss", "perplexity"}
    both = outcomes_of_text(llama, examples, 0, choices=choices).metrics()
    assert set(both) == {"loss", "perplexity", "accuracy", "macro_f1"}
    assert both["loss"] == plain["loss"]
    with pytest.raises(IngraftError, match="no rows"):
        outcomes_of_text(llama, [], 0)
    with pytest.raises(IngraftError, match="no evaluation yet"):
        scorer_of("diffusion")


def test_every_layer_declares_the_same_tasks() -> None:
    """A task that a recipe may name is one entry in each layer's table, and every entry leads somewhere."""
    from ingraft.bases import HEADS
    from ingraft.data import TASKS
    from ingraft.recipe import READY_TASKS
    from ingraft.train.objectives import OBJECTIVES, objective_for

    assert list(READY_TASKS) == list(TASKS) == list(HEADS) == list(SCORERS) == list(OBJECTIVES)
    for task in READY_TASKS:
        assert scorer_of(task).task == task
        assert hasattr(transformers, HEADS[task].loader)
        assert HEADS[task].named == (TASKS[task].labels is not None)
        objective_for(task, BertForSequenceClassification(BertConfig(num_hidden_layers=1)), 0)
