#!/usr/bin/env bash
# Installs what is missing, then checks style and types and runs the tests. On a machine with a GPU, also those marked `gpu`.
#
#   bash scripts/test.sh                        # everything, and the Megatron tests with a newer megatron-core too
#   bash scripts/test.sh tests/parallel -k ring # any pytest arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
set_up train,dev

if can_import python ruff >/dev/null; then
    say "ruff: style"
    python -m ruff check .
    python -m ruff format --check .
else
    say "WARNING: ruff could not be installed; style is not checked"
fi
if can_import python mypy >/dev/null; then
    say "mypy: types"
    python -m mypy
else
    say "WARNING: mypy could not be installed; types are not checked"
fi

# Two pytest processes: the multi-rank tests bring processes of their own. Tests marked `gpu` share one of the two.
parallel=()
if can_import python xdist >/dev/null; then parallel=(-n 2 --dist loadgroup); fi
if [ $# -gt 0 ]; then
    say "pytest ${parallel[*]} $*"
    exec python -m pytest "${parallel[@]}" "$@"
fi
# The newer megatron-core first, so that the summary of all tests comes last.
newer=0
bash scripts/test_megatron_version.sh 0.19.2 || newer=$?
say "pytest ${parallel[*]}"
python -m pytest "${parallel[@]}"
exit "$newer"
