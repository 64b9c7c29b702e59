"""`ingraft merge`: an adapter written into its base, as a plain model folder.

Merging replaces the adapter's own arithmetic by the base's with changed weights. In exact numbers both agree; in bfloat16 the changed weight
is rounded to eight bits and they differ. Over packed weights the sum stays dense, and the folder holds what the blocks say, unpacked. So both are run on real text, the largest difference of the logits is printed, and above a
bound nothing is written.

A base in several files is merged file by file, without the merged model ever being in memory (`adapt/files/shards.py`); what is compared then is the
folder as it was written, read back in the same way as the base, as a view of its files. Where that cannot be (said in the output), and for a base in one file, the
merge is made in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ingraft.cli.options import adapter_option, given, needed, trust_option, verb
from ingraft.cli.output import Output
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ingraft.cli.sources import Opened

BOUNDS = {"float32": 3e-4, "float16": 0.015, "bfloat16": 0.12}
"""Largest logit difference accepted without being asked, in sizes of the largest logit: above what rounding does in each dtype (on SmolLM2,
with logits up to 35, a trained LoRA showed 0.0001 in float32 and 1.6 in bfloat16)."""

MOST_LOST = 0.5
"""Share of what the adapter does to the logits (root of mean squares) that rounding may take away. A merge that lost the adapter shows 1."""


@verb("model", "dtype", "quantization", "data.max_length")
@adapter_option
@trust_option
@click.option("--output-dir", metavar="DIR", help="the model folder to write")
@click.option("--data", metavar="FILE", help="compare on the first rows of this file instead of a built-in row")
@click.option(
    "--max-difference",
    type=float,
    metavar="NUMBER",
    help="refuse above this logit difference; by default it depends on the dtype",
)
@click.option(
    "--untie", is_flag=True, help="give a merged weight that the base ties to another one a tensor of its own"
)
@click.option("--overwrite-output-dir", is_flag=True, help="replace a folder that is there")
def command(
    config: str | None,
    as_json: bool,
    adapter: str | None,
    allow_base_mismatch: bool,
    trust_remote_code: bool,
    output_dir: str | None,
    data: str | None,
    max_difference: float | None,
    untie: bool,
    overwrite_output_dir: bool,
    **arguments: Any,
) -> None:
    """Write an adapter into its base: a plain model folder, checked against the unmerged model.

    Prints the largest difference between the logits of the merged and the unmerged model on real text, and refuses to write above a bound.
    """
    from ingraft.cli.sources import free_folder, open_model, settle
    from ingraft.data import task_of
    from ingraft.evaluate import scorer_of

    output = Output(as_json=as_json)
    missing = needed(("--adapter DIR", adapter), ("--output-dir DIR", output_dir))
    if missing or adapter is None or output_dir is None:
        raise IngraftError(*missing)
    target = free_folder(output_dir, overwrite_output_dir)
    recipe = settle(given(arguments), config=config, adapter=adapter, needs_data=False)
    opened = open_model(
        recipe, adapter, output, trust_remote_code=trust_remote_code, allow_base_mismatch=allow_base_mismatch
    )
    found = merge_and_write(
        opened, target, data, bound=max_difference, untie=untie, overwrite=overwrite_output_dir, say=output.say
    )
    output.result({"output_dir": output_dir, **found})
    output.say(
        f"largest logit difference, merged to unmerged: {found['max_difference']:.3g} "
        f"(bound {found['bound']:g}, {found['dtype']}, {found['tokens']} {task_of(recipe.task).counted[1]}, logits up to {found['largest_logit']:.1f})",
        f"the likeliest outcome is the same at {found['same_choice']:.1%} of the places; rounding took {found['lost']:.1%} of what the adapter does",
        f"written: {output_dir}" + (", file by file" if found["by_file"] else ""),
        "",
        "next:",
        f"  ingraft chat --model {output_dir}"
        if scorer_of(recipe.task).writes
        else f"  ingraft eval --model {output_dir} --data FILE",
    )


def merge_and_write(
    opened: Opened,
    target: Any,
    data: str | None,
    *,
    bound: float | None,
    untie: bool = False,
    overwrite: bool,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Merge, compare, and write the folder, all or nothing. Returns the comparison.

    Raises:
        IngraftError: the method cannot be merged; the difference is above the bound; the disk refuses.
    """
    from pathlib import Path

    import ingraft
    from ingraft import adapt, durable
    from ingraft.adapt.files import shards

    model, source = opened.model, Path(opened.source)
    batches = input_batches(opened, data)
    dtype = str(model.dtype).removeprefix("torch.")
    before = [logits(model, batch) for batch in batches]
    with adapt.disabled(model):
        bare = [logits(model, batch) for batch in batches]

    def judged(merged: Any) -> dict[str, Any]:
        after = [logits(merged, batch) for batch in batches]
        found = comparison(before, after) | {"lost": lost(before, after, bare)}
        return {"bound": _refused_above(found, dtype, bound), "dtype": dtype, **found}

    facts: dict[str, Any] = {"merged_from": opened.adapter, "base": opened.recipe.model, "dtype": dtype}
    sharded = shards.is_sharded(source)
    reason = shards.unfit(model, source) if sharded else None
    durable.require_space(target, sum(p.numel() * p.element_size() for p in model.parameters()))
    with durable.folder(target, overwrite=overwrite, facts=facts) as scratch:
        if by_file := sharded and reason is None:
            try:
                shards.write_folder(model, source, scratch, untie=untie)
            except shards.NotStreamed as error:
                by_file, reason = False, str(error)
        if reason is not None:
            say(f"merged in memory as a whole, not file by file: {reason}")
        if by_file:
            found = judged(type(model).from_pretrained(scratch, dtype=model.dtype).eval())
        else:
            ingraft.merge(model, safe=True, untie=untie)
            found = judged(model)
            ingraft.detach(model, keep_merged=True)
            adapt.make_dense(model)  # layers kept packed that the adapter left alone
            model.save_pretrained(scratch)
        opened.tokenizer.save_pretrained(scratch)
        facts["max_difference"] = found["max_difference"]
    return {
        **found,
        "tokens": counted(batches),
        "by_file": by_file,
    }


def _refused_above(found: dict[str, Any], dtype: str, bound: float | None) -> float:
    """The bound that a comparison keeps.

    Raises:
        IngraftError: it does not.
    """
    worst = found["max_difference"]
    limit = BOUNDS.get(dtype, BOUNDS["float32"]) * found["largest_logit"] if bound is None else bound
    if not worst <= limit or (bound is None and not found["lost"] <= MOST_LOST):
        raise IngraftError(
            f"the merged model's logits differ from the unmerged one's by up to {worst:.3g} (bound {limit:.3g}), which is {found['lost']:.0%} of "
            f"what the adapter does to them (bound {MOST_LOST:.0%}); nothing was written. Merge in a finer dtype (--dtype float32), or accept "
            "the difference with --max-difference."
        )
    return limit


def comparison(before: list[Tensor], after: list[Tensor]) -> dict[str, Any]:
    """How far two models' logits on the same tokens are apart."""
    pairs = list(zip(after, before, strict=True))
    places = sum(old[..., 0].numel() for old in before)
    return {
        "max_difference": max((new - old).abs().max().item() for new, old in pairs),
        "same_choice": sum(int((new.argmax(-1) == old.argmax(-1)).sum()) for new, old in pairs) / places,
        "largest_logit": max(old.abs().max().item() for old in before),
    }


def lost(before: list[Tensor], after: list[Tensor], bare: list[Tensor]) -> float:
    """What merging changed, as a share of what the adapter does to the bare base's logits (roots of mean squares)."""
    error, effect = (
        sum((one - other).square().mean().item() for one, other in zip(those, before, strict=True)) ** 0.5
        for those in (after, bare)
    )
    return error / effect if effect else float(error > 0)


def input_batches(opened: Opened, data: str | None, *, rows: int = 8) -> list[dict[str, Tensor]]:
    """What the model is given to compare on, a row each: the task's built-in row, or the first rows of the user's data as the task encodes them."""
    import dataclasses

    from ingraft.cli.sources import model_labels
    from ingraft.data.wanted import load_wanted
    from ingraft.evaluate import scorer_of

    recipe, device = opened.recipe, opened.model.device
    labels = model_labels(opened)
    if data is None:
        found = [scorer_of(recipe.task)(opened.model, opened.tokenizer, labels).trial()]
    else:
        from ingraft.bases.heads import scale_of
        from ingraft.data import collate

        wanted = dataclasses.replace(recipe.data, train=data, eval=0, test=None)
        described = dataclasses.replace(recipe, data=wanted)
        examples = load_wanted(described, opened.tokenizer, labels, scale_of(opened.model)).train[:rows]
        found = [collate([example.sequences[0]], 0) for example in examples]
    learned = ("labels", "decoder_attention_mask")
    return [{name: x.to(device) for name, x in batch.items() if name not in learned} for batch in found]


def counted(batches: list[dict[str, Tensor]]) -> int:
    """How many tokens the rows have; one for a row without."""
    return sum(batch["input_ids"].numel() if "input_ids" in batch else 1 for batch in batches)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits in float32; those of a head that finds answers, first and last token, side by side; the states of a
    base without a head. A decoder behind an encoder is
    given what the encoder reads."""
    import torch

    from ingraft.bases.heads import PAIR, way_of_writing
    from ingraft.evaluate.loss import as_computed

    more = {"decoder_input_ids": inputs["input_ids"]} if way_of_writing(model.config) == PAIR else {}
    with torch.inference_mode():
        found = model(**as_computed(model, inputs), **more)
        if "start_logits" in found:
            return torch.stack((found["start_logits"], found["end_logits"]), dim=-1).float()
        return (found["logits"] if "logits" in found else found["last_hidden_state"]).float()
