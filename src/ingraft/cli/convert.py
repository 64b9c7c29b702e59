"""`ingraft convert`: an adapter of any mergeable method rewritten as a LoRA, which every engine reads.

The conversion is the best one there is of its rank (singular values of the change at each site), and it is rarely exact: what is left out is
printed for each site, and both adapters are run on real text, because a share of a matrix says little about an answer.
"""

from __future__ import annotations

from typing import Any

import click

from ingraft.cli.options import adapter_option, given, needed, trust_option, verb
from ingraft.cli.output import Output
from ingraft.errors import IngraftError


@verb("model", "dtype", "quantization", "data.max_length")
@adapter_option
@trust_option
@click.option("--rank", type=int, metavar="N", help="rank of the LoRA at every site")
@click.option(
    "--error",
    type=float,
    metavar="SHARE",
    help="instead of a rank: at each site the smallest that leaves out at most this share of the change (0.1 is a tenth)",
)
@click.option("--output-dir", metavar="DIR", help="the adapter folder to write")
@click.option("--data", metavar="FILE", help="compare on the first rows of this file instead of a built-in paragraph")
@click.option("--overwrite-output-dir", is_flag=True, help="replace an adapter that is there")
def command(
    config: str | None,
    as_json: bool,
    adapter: str | None,
    allow_base_mismatch: bool,
    trust_remote_code: bool,
    rank: int | None,
    error: float | None,
    output_dir: str | None,
    data: str | None,
    overwrite_output_dir: bool,
    **arguments: Any,
) -> None:
    """Rewrite an adapter of any mergeable method as a LoRA of a given rank.

    Prints what the rank leaves out at each site, and the largest difference between the logits of the two adapters on real text.
    """
    from ingraft.cli.sources import free_folder, open_model, settle

    output = Output(as_json=as_json)
    missing = needed(("--adapter DIR", adapter), ("--output-dir DIR", output_dir))
    if (rank is None) == (error is None):
        missing.append("--rank N or --error SHARE is needed, one of them.")
    if rank is not None and rank < 1:
        missing.append(f"--rank must be at least 1, got {rank}.")
    if error is not None and not 0 < error < 1:
        missing.append(f"--error must lie between 0 and 1, got {error}.")
    if missing or adapter is None or output_dir is None:
        raise IngraftError(*missing)
    target = free_folder(output_dir, overwrite_output_dir)
    recipe = settle(given(arguments), config=config, adapter=adapter, needs_data=False)
    opened = open_model(
        recipe, adapter, output, trust_remote_code=trust_remote_code, allow_base_mismatch=allow_base_mismatch
    )
    found = convert_and_write(opened, target, data, rank=rank, error=error, overwrite=overwrite_output_dir)
    output.result({"output_dir": output_dir, **found})
    output.table(
        ["site", "rank", "change", "relative error"],
        [[path, site["rank"] or "whole", site["norm"], site["error"]] for path, site in found["sites"].items()],
    )
    output.say(
        f"relative error over all sites: {found['error']:.3g}",
        f"largest logit difference, converted to original: {found['max_difference']:.3g} "
        f"({found['tokens']} tokens, logits up to {found['largest_logit']:.1f})",
        f"the likeliest outcome is the same at {found['same_choice']:.1%} of the places",
        f"written: {output_dir} ({found['method']}, {found['parameters']:,} parameters)",
    )


def convert_and_write(
    opened: Any, target: Any, data: str | None, *, rank: int | None, error: float | None, overwrite: bool
) -> dict[str, Any]:
    """Convert, compare on real text, and write the folder. Returns the comparison.

    Raises:
        IngraftError: the method is no change of weights; the disk refuses.
    """
    import ingraft
    from ingraft.bases.heads import scale_of
    from ingraft.cli.merge import comparison, counted, input_batches, logits
    from ingraft.cli.sources import model_labels

    model = opened.model
    batches = input_batches(opened, data)
    before = [logits(model, batch) for batch in batches]
    made = ingraft.convert(model, opened.adapter, rank, name="converted", error=error)
    after = [logits(model, batch) for batch in batches]
    sites = {
        path: {"rank": site.rank, "norm": site.norm, "error": site.share, "exact": site.rank is None}
        for path, site in made.sites.items()
    }
    ingraft.save(
        model,
        target,
        "converted",
        extra={
            "converted_from": opened.adapter,
            "relative_error": made.error,
            # A head's outputs mean nothing without these.
            "run": {"task": opened.recipe.task, "labels": model_labels(opened), "scale": scale_of(opened.model)},
        },
        overwrite=overwrite,
    )
    return {
        "method": made.method,
        "parameters": made.parameters,
        "error": made.error,
        "sites": sites,
        "tokens": counted(batches),
        **comparison(before, after),
    }
