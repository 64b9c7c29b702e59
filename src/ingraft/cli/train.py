"""`ingraft train`: a recipe in, a run folder out."""

from __future__ import annotations

from typing import Any

import click

from ingraft.cli.options import given, trust_option, verb
from ingraft.cli.output import Output


@verb()
@trust_option
@click.option(
    "--allow-base-mismatch", is_flag=True, help="start from an adapter although it was trained on another base"
)
@click.option("--resume-from-checkpoint", metavar="last|DIR", help="go on from a checkpoint of this run")
@click.option("--overwrite-output-dir", is_flag=True, help="replace a run folder that is there")
def command(
    config: str | None,
    as_json: bool,
    trust_remote_code: bool,
    allow_base_mismatch: bool,
    resume_from_checkpoint: str | None,
    overwrite_output_dir: bool,
    **arguments: Any,
) -> None:
    """Train one adapter, or the whole model, from a recipe: writes a run folder.

    Ctrl-C stops cleanly and leaves a checkpoint to resume from.
    """
    from ingraft.recipe import load_recipe

    output = Output(as_json=as_json)
    from ingraft.train.place import absent

    recipe = load_recipe(config, given(arguments), also=absent)
    from ingraft.train.run import train

    run = train(
        recipe,
        resume_from_checkpoint=resume_from_checkpoint,
        overwrite_output_dir=overwrite_output_dir,
        trust_remote_code=trust_remote_code,
        allow_base_mismatch=allow_base_mismatch,
        quiet=as_json,
    )
    output.result({"run": str(run.folder), "metrics": run.metrics})
    before, after = run.metrics.get("before") or {}, run.metrics.get("after") or {}
    if after:
        output.say("")
        output.table(["metric", "before", "after"], [[name, before.get(name), value] for name, value in after.items()])
    for sample in run.samples:
        output.say("", *sample_lines(sample))
    output.say(
        "",
        f"run folder  {run.folder}",
        f"report      {run.folder}/report.html",
        "",
        "next:",
        *(f"  {line}" for line in next_commands(str(run.folder), recipe.task)),
    )


def sample_lines(sample: dict[str, str], *, longest: int = 600) -> list[str]:
    """A row, its answer, and what the model said before and after."""
    prompt = sample["prompt"] if len(sample["prompt"]) <= longest else "... " + sample["prompt"][-longest:]
    return [
        *(f"  {line}" for line in prompt.splitlines() if line.strip()),
        *(f"  {name + ':':<9} {sample[name]}" for name in ("expected", "before", "after")),
    ]


def next_commands(folder: str, task: str) -> list[str]:
    """What a person can type now."""
    use = [f"ingraft chat --adapter {folder}"] if task != "classify" else []
    return [
        *use,
        f"ingraft eval --adapter {folder} --data FILE",
        f"ingraft predict --adapter {folder} --data FILE --output answers.jsonl",
        f"ingraft merge --adapter {folder} --output-dir {folder}-merged",
    ]
