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
types=true
if can_import python mypy >/dev/null; then
    types="python -m mypy"
else
    say "WARNING: mypy could not be installed; types are not checked"
fi

# Two pytest processes: the multi-rank tests bring processes of their own. Tests marked `gpu` share one of the two.
parallel=()
if can_import python xdist >/dev/null; then parallel=(-n 2 --dist loadgroup); fi
if [ $# -gt 0 ]; then
    say "mypy: types"
    $types
    say "pytest ${parallel[*]} $*"
    exec python -m pytest "${parallel[@]}" "$@"
fi

# mypy has one core, the tests with the newer megatron-core the other.
found="$(mktemp)"
$types >"$found" 2>&1 &
checking=$!
trap 'kill $checking 2>/dev/null; rm -f "$found"' EXIT # an interrupt does not reach what runs in the background
newer=0
bash scripts/test_megatron_version.sh 0.19.2 || newer=$?
say "mypy: types"
typed=0
wait $checking || typed=$?
trap - EXIT
cat "$found"
rm -f "$found"
[ $typed -eq 0 ] || exit $typed

# All of a file's tests in one process: what they share is made once. Files in order: folders, which take longest, come first.
if [ ${#parallel[@]} -gt 0 ]; then parallel=(-n 2 --dist loadfile --no-loadscope-reorder); fi
say "pytest ${parallel[*]}"
python -m pytest "${parallel[@]}"
exit "$newer"
