"""Fill the tables and figures of README.md and docs/*.md, and draw the plots, from docs/results/*.json.

    python -m scripts.make_tables            # writes all
    python -m scripts.make_tables --print    # the tables only, to standard output

Tables go between the comments `<!-- results:NAME -->` and `<!-- /results:NAME -->`, figures in a sentence between `<!--=NAME-->`
and `<!--/-->`; plots go beside the JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moba_cp.planning.calibration import Calibration

from . import sanitize
from .harness.records import REPOSITORY
from .tables.equality import equality_table, pretrain_table
from .tables.figures import figures
from .tables.floors import floors_table
from .tables.headline import headline
from .tables.huggingface import decode_table, huggingface_table
from .tables.kernels import kernels_plot, kernels_table, load
from .tables.layer import layer_tables
from .tables.learning import learning_headline
from .tables.planning import balance_table, clusters_table, predictions_table
from .tables.sanitizer import sanitizer_table
from .tables.scaling import longest_table, scaling_plot, scaling_table, scaling_tables
from .tables.soak import soak_table
from .tables.speed import exchanges_table, gpus_table, profile_plot, speed_table
from .tables.text import fill, fill_figures
from .tables.torch_parts import compile_table, fsdp_table
from .tables.training import long_run_plot, long_run_text, training_plot, training_table
from .tables.trials import trial_tables
from .tables.versions import versions_tables

RESULTS = REPOSITORY / "docs" / "results"
NOT_MEASURED = "Not measured yet: no docs/results/scaling*.json."
NO_LONGEST = "No context of 4M tokens or more was measured yet; `configs/scaling/longest.yaml` does it."


def main(
    print_only: Annotated[bool, typer.Option("--print", help="print the tables, write nothing")] = False,
) -> None:
    """Fill every marked block of README.md and docs/*.md, and draw the plots."""
    if print_only:
        print(*blocks().values(), sep="\n\n")
        return
    fill(blocks(), pages())
    fill_figures(figures(RESULTS), pages())
    kernels_plot(*load(kernel_files()), RESULTS / "kernels.png")
    training_plot(content("context_parallel_training"), RESULTS / "context_parallel_training.png")
    for file in sorted(RESULTS.glob("long_run*.json")):
        long_run_plot(json.loads(file.read_text()), file.with_suffix(".png"))
    if scaling := contents("scaling"):
        scaling_plot(scaling, RESULTS / "scaling.png")
    profile_plot(content("training_speed"), RESULTS / "training_profile.png")


def pages() -> list[Path]:
    """Pages with tables or figures, and what `examples.learning.report` makes one of."""
    docs, learning = REPOSITORY / "docs", REPOSITORY / "examples" / "learning" / "learning.md.in"
    return [REPOSITORY / "README.md", *sorted(docs.glob("*.md")), *sorted(RESULTS.glob("*.md")), learning]


def blocks() -> dict[str, str]:
    """Markdown of every table, by the name of the block that it goes into."""
    about, results, dense = load(kernel_files())
    return {
        "results:headline": headline(content("scaling"), content("training_scaling")),
        "results:kernels": kernels_table(about, results, dense),
        "results:floors": floors_table(content("kernels"), content("kernels_512k")),
        "results:kernels_h200": kernels_table(*load(kernel_files(h200=True))),
        "results:layer": layer_tables(contents("layer")),
        "results:training": training_table(content("context_parallel_training")),
        "results:long_run": long_run_text(contents("long_run")),
        "results:speed": speed_table(content("training_speed")),
        "results:training_scaling": gpus_table(content("training_scaling"), content("training_speed")),
        "results:training_exchanges": exchanges_table(content("training_exchanges")),
        "results:equality": equality_table(content("parallel_equality")),
        "results:pretrain": pretrain_table(content("pretrain_gpt")),
        "results:huggingface": huggingface_table(content("huggingface")),
        "results:soak": soak_table(contents("soak")),
        "results:sanitizer": sanitizer_table(content("sanitizer"), sanitize.CASES),
        "results:versions": versions_tables(contents("versions")),
        "results:decode": decode_table(content("decode")),
        "results:fsdp": if_measured("fsdp", fsdp_table),
        "results:compile": if_measured("compile", compile_table),
        "results:scaling": scaling_tables(contents("scaling")) or NOT_MEASURED,
        "results:two_nodes": scaling_table(content("two_nodes")),
        "results:longest": longest_table(contents("scaling")) or NO_LONGEST,
        "results:predictions": predictions_table(RESULTS),
        "results:clusters": clusters_table(Calibration.default()),
        "results:balance": balance_table(),
        "results:scaling_headline": scaling_headline(),
        "results:learning_headline": learning_headline(content("learning")),
        **trial_tables(content("trials")),
    }


def kernel_files(h200: bool = False) -> list[Path]:
    """Every kernels*.json of an H100, or of an H200; of equal cases the last file counts."""
    return [file for file in sorted(RESULTS.glob("kernels*.json")) if file.stem.startswith("kernels_h200") == h200]


def scaling_headline() -> str:
    """The picture and the longest contexts, for the README."""
    if not contents("scaling"):
        return NOT_MEASURED
    picture = "![Time of one layer by tokens and GPUs, and its efficiency](docs/results/scaling.png)"
    return "\n\n".join(filter(None, [picture, longest_table(contents("scaling"), fastest=True)]))


def contents(name: str) -> list[dict[str, Any]]:
    """Of every file `name*.json`; none where nothing was measured yet."""
    return [_of_file(file) for file in sorted(RESULTS.glob(f"{name}*.json"))]


def if_measured(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    """A table of the file `name`.json, or that there is none yet."""
    return (
        table(content(name))
        if (RESULTS / f"{name}.json").exists()
        else f"Not measured yet: no docs/results/{name}.json."
    )


def content(name: str) -> dict[str, Any]:
    """Of the file `name`.json."""
    return _of_file(RESULTS / f"{name}.json")


def _of_file(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"{file} is damaged: {error}") from None
    return found


if __name__ == "__main__":
    typer.run(main)
