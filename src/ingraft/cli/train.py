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
@click.option("--profile", is_flag=True, help="show where the time of one step goes, and keep it as profile.json")
def command(
    config: str | None,
    as_json: bool,
    trust_remote_code: bool,
    allow_base_mismatch: bool,
    resume_from_checkpoint: str | None,
    overwrite_output_dir: bool,
    profile: bool,
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
        profile=profile,
        quiet=as_json,
    )
    output.result({"run": str(run.folder), "metrics": run.metrics, **({"profile": run.profile} if profile else {})})
    if run.profile is not None:
        show_profile(output, run.profile)
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


def show_profile(output: Output, profile: dict[str, Any]) -> None:
    """Two tables: the parts of the step, and its longest operations."""
    seconds = profile["seconds"]
    ratio = "" if profile["roofline"] is None else f", {profile['roofline']:.2f} times its matrix products alone"
    counted = profile["tokens"] != profile["rows"]  # a picture has none, and counts as one
    tokens = f", {profile['tokens']:,} tokens" if counted else ""
    output.say(
        "",
        f"profile of step {profile['step']}: {profile['rows']} rows{tokens}, {seconds:.2f} s{ratio}",
    )
    parts = {**profile["phases"], "the rest": max(0.0, seconds - sum(profile["phases"].values()))}
    output.table(
        ["part", "ms", "share"], [[name, _ms(spent), _share(spent / seconds)] for name, spent in parts.items()]
    )
    output.say("")
    output.table(
        ["of all operations", "share"],
        [["matrix products", _share(profile["products"])], ["attention", _share(profile["attention"])]],
    )
    output.say("")
    output.table(
        ["operation", "calls", "self ms", "share"],
        [[one["name"], one["calls"], _ms(one["seconds"]), _share(one["share"])] for one in profile["operations"]],
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:9,.1f}"


def _share(part: float) -> str:
    return f"{100 * part:5.1f} %"


def sample_lines(sample: dict[str, str], *, longest: int = 600) -> list[str]:
    """A row, its answer, and what the model said before and after."""
    prompt = sample["prompt"] if len(sample["prompt"]) <= longest else "... " + sample["prompt"][-longest:]
    return [
        *(f"  {line}" for line in prompt.splitlines() if line.strip()),
        *(f"  {name + ':':<9} {sample[name]}" for name in ("expected", "before", "after")),
    ]


def next_commands(folder: str, task: str) -> list[str]:
    """What a person can type now."""
    from ingraft.evaluate import scorer_of

    use = [f"ingraft chat --adapter {folder}"] if scorer_of(task).writes else []
    return [
        *use,
        f"ingraft eval --adapter {folder} --data FILE",
        f"ingraft predict --adapter {folder} --data FILE --output answers.jsonl",
        f"ingraft merge --adapter {folder} --output-dir {folder}-merged",
    ]
