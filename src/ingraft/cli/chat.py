"""`ingraft chat`: a conversation in the terminal, with the adapters at hand to switch between.

It works through a pipe as well: every line of standard input is a turn, and only the answers are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import click

from ingraft.cli.options import given, trust_option, verb
from ingraft.cli.output import Output
from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.cli.sources import Opened

COMMANDS = {
    "/adapter": "NAME or DIR: answer with this adapter (a folder is loaded first)",
    "/base": "answer without any adapter",
    "/reset": "forget the conversation",
    "/help": "these commands",
    "/quit": "leave (so does Ctrl-D)",
}


@dataclass(kw_only=True)
class Talk:
    """One conversation: what was said, and which adapter answers."""

    opened: Opened
    output: Output
    options: dict[str, Any]
    adapters: list[str] = field(default_factory=list[str])
    active: str | None = None
    allow_base_mismatch: bool = False
    turns: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


@verb("model", "dtype", "quantization")
@trust_option
@click.option(
    "--adapter", "adapters", multiple=True, metavar="DIR", help="an adapter or run folder; several to switch between"
)
@click.option("--allow-base-mismatch", is_flag=True, help="load adapters although they were trained on another base")
@click.option("--prompt", metavar="TEXT", help="answer this and leave")
@click.option("--system", metavar="TEXT", help="a system message in front of the conversation")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="INTEGER",
    help="longest answer, in tokens",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    metavar="NUMBER",
    help="0 takes the likeliest token; higher is freer",
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    metavar="NUMBER",
    help="sample from the likeliest tokens of this total probability",
)
@click.option("--seed", default=0, show_default=True, metavar="INTEGER", help="of sampling")
def command(
    config: str | None,
    as_json: bool,
    trust_remote_code: bool,
    adapters: tuple[str, ...],
    allow_base_mismatch: bool,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    **arguments: Any,
) -> None:
    """Talk to a base with one adapter, or switch adapters while talking.

    While talking: /adapter NAME, /base, /reset, /help, /quit.
    """
    from ingraft.cli.sources import open_model, settle
    from ingraft.evaluate import scorer_of

    output = Output(as_json=as_json)
    first = adapters[0] if adapters else None
    recipe = settle(given(arguments), config=config, adapter=first, needs_data=False)
    if not scorer_of(recipe.task).writes:
        raise IngraftError(
            f"{first or recipe.model}: is for the task {recipe.task!r} and does not talk; use `ingraft predict` or `ingraft eval`."
        )
    opened = open_model(
        recipe,
        first,
        output,
        trust_remote_code=trust_remote_code,
        allow_base_mismatch=allow_base_mismatch,
        announce=sys.stdin.isatty(),
    )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        import torch

        torch.manual_seed(seed)
        options.update(temperature=temperature, top_p=top_p)
    talk = Talk(
        opened=opened, output=output, options=options, active=opened.adapter, allow_base_mismatch=allow_base_mismatch
    )
    talk.adapters = [opened.adapter] if opened.adapter else []
    for folder in adapters[1:]:
        _load(talk, folder)
    if adapters[1:]:
        _use(talk, talk.adapters[0])
    opening = [{"role": "system", "content": system}] if system else []
    talk.turns = list(opening)
    if prompt is not None:
        _answer(talk, prompt)
        return
    _converse(talk, opening)


def _converse(talk: Talk, opening: list[dict[str, str]]) -> None:
    if sys.stdin.isatty():
        talk.output.say("/help lists the commands; Ctrl-D leaves.")
    for line in _lines(talk):
        words = line.split(maxsplit=1)
        if not words:
            continue
        try:
            match words:
                case _ if not line.startswith("/"):
                    _answer(talk, line)
                case ["/quit" | "/exit"]:
                    return
                case ["/reset"]:
                    talk.turns = list(opening)
                    talk.output.say("(forgotten)")
                case ["/base"]:
                    _use(talk, None)
                case ["/adapter"]:
                    talk.output.say(f"(at hand: {', '.join(talk.adapters) or 'none'}; /adapter DIR loads one)")
                case ["/adapter", name]:
                    _use(talk, name.strip() if name.strip() in talk.adapters else _load(talk, name.strip()))
                case ["/help"]:
                    talk.output.say(*(f"{name:<9} {meaning}" for name, meaning in COMMANDS.items()))
                case _:
                    raise IngraftError(f"there is no command {words[0]}{nearest(words[0], COMMANDS)}.")
        except IngraftError as error:  # a slip while talking does not end the talk
            talk.output.say(*(f"({problem})" for problem in error.problems))


def _lines(talk: Talk) -> Iterator[str]:
    """What the person says: with line editing and history in a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import contextlib
    import importlib

    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives `input` editing and history
    while True:
        try:
            yield input(f"{talk.active or 'base'}> ")
        except EOFError:
            talk.output.say("")
            return


def _load(talk: Talk, folder: str) -> str:
    """Load an adapter folder under a free name made from the folder's."""
    import re
    from pathlib import Path

    import ingraft
    from ingraft.cli.sources import adapter_folder

    path = adapter_folder(folder)
    wanted = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(folder).resolve().name).lstrip("-._")[:60] or "adapter"
    name = next(n for n in (wanted, *(f"{wanted}-{i}" for i in range(2, 1000))) if n not in talk.adapters)
    ingraft.load(talk.opened.model, path, name=name, allow_base_mismatch=talk.allow_base_mismatch)
    talk.adapters.append(name)
    return name


def _use(talk: Talk, name: str | None) -> None:
    import ingraft

    if talk.adapters:
        ingraft.activate(talk.opened.model, *([name] if name else []))
    talk.active = name
    talk.output.say(f"(now: {name or 'base'})")


def _answer(talk: Talk, question: str) -> None:
    """Generate the answer to a turn, printing it as it comes, and keep both.

    Raises:
        IngraftError: the base has no place left for an answer; the conversation is then as it was.
    """
    import torch
    from transformers import TextStreamer

    from ingraft.data import encode_prompt
    from ingraft.data.records import Message
    from ingraft.evaluate.room import room

    class Printer(TextStreamer):
        """Hands finished words on as soon as they are certain."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            click.echo(text, nl=stream_end)

    model, tokenizer = talk.opened.model, cast("PreTrainedTokenizerBase", talk.opened.tokenizer)
    turns = [*talk.turns, {"role": "user", "content": question}]
    most, wanted = room(model), int(talk.options["max_new_tokens"])
    spare = min(wanted, most // 2)  # old turns go before the answer gets less than this
    ids = encode_prompt(cast("list[Message]", turns), tokenizer)
    dropped = 0
    while len(ids) > most - spare and sum(turn["role"] == "user" for turn in turns) > 1:
        start = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
        del turns[start : start + 2]  # the oldest question and its answer
        dropped += 1
        ids = encode_prompt(cast("list[Message]", turns), tokenizer)
    if len(ids) >= most:
        raise IngraftError(
            f"the question takes {len(ids)} tokens and the base has places for {most}, so none is left for an answer; shorten it."
        )
    for _ in range(dropped):
        talk.output.say("(the conversation is longer than the base can read; its oldest turn was dropped)")
    talk.turns = turns
    prompt_BT = torch.tensor([ids], device=model.device)
    streamer = None if talk.output.as_json else Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        out_BT = cast(Any, model).generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
            **{**talk.options, "max_new_tokens": min(wanted, most - len(ids))},
        )
    answer = cast(str, tokenizer.decode(out_BT[0, len(ids) :], skip_special_tokens=True)).strip()
    talk.turns.append({"role": "assistant", "content": answer})
    if talk.output.as_json:
        import json

        click.echo(json.dumps({"adapter": talk.active, "prompt": question, "answer": answer}, ensure_ascii=False))
