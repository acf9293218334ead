"""The command `moba-cp`, also `python -m moba_cp`: subcommands are in `moba_cp.commands`, which needs typer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`; None for those of the process.

    Raises:
        SystemExit: always: the status of the command; or typer, which no other part of the library needs, is not installed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"moba_cp {__version__}")
        raise SystemExit(0)
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "yaml"):
            raise
        raise SystemExit(f"moba-cp needs {error.name}, which is not installed: pip install 'moba_cp[cli]'") from None
    app(given, prog_name="moba-cp")


if __name__ == "__main__":
    main()
