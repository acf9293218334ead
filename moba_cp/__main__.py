"""The command `moba-cp`, also `python -m moba_cp`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`; None for those of the process."""
    parser = argparse.ArgumentParser(prog="moba-cp", description="MoBA attention over a context-parallel group")
    parser.add_argument("--version", action="version", version=f"moba_cp {__version__}")
    parser.parse_args(arguments)
    parser.print_help()


if __name__ == "__main__":
    main()
