"""Subcommands of `moba-cp`: `plan` predicts time and memory, `doctor` looks at this machine. Only `__main__` imports it."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .doctor import doctor
from .plan import plan

app = typer.Typer(
    help="MoBA attention over a context-parallel group.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(plan)
app.command()(doctor)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"moba_cp {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """MoBA attention over a context-parallel group."""
