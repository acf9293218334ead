#!/usr/bin/env bash
# Runs the tests of MoBA in Megatron with a newer megatron-core than pip installs on this Python: its wheel is fetched once,
# unpacked under .cache/ and put first on PYTHONPATH. Without a network it says so and leaves with success.
#
#   bash scripts/test_megatron_version.sh                          # 0.19.2
#   bash scripts/test_megatron_version.sh 0.18.0                   # another version
#   bash scripts/test_megatron_version.sh 0.19.2 tests/megatron    # any pytest arguments; here every Megatron test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version="${1:-0.19.2}"
shift $(($# > 0 ? 1 : 0))
say() { printf '==> %s\n' "$*"; }

installed="$(python -c 'from importlib.metadata import version; print(version("megatron-core"))' 2>/dev/null || echo none)"
if [ "$installed" = none ]; then
    say "WARNING: megatron-core is not installed; its tests are left out"
    exit 0
fi
if [ "$installed" = "$version" ]; then
    say "megatron-core $version is what is installed"
    exit 0
fi

folder="$PWD/.cache/megatron_core-$version"
if [ ! -d "$folder/megatron" ]; then
    say "fetching megatron-core $version"
    rm -rf "$folder" "$folder.part"
    mkdir -p "$folder.part"
    # It asks for a newer Python in its metadata, and runs on 3.11.
    if ! python -m pip download --quiet --retries 1 --timeout 15 --disable-pip-version-check --no-deps \
        --only-binary=:all: --python-version 3.12 --dest "$folder.part" "megatron-core==$version"; then
        rm -rf "$folder.part"
        say "WARNING: megatron-core $version could not be fetched (no network?); only $installed is tested"
        exit 0
    fi
    python -m zipfile -e "$folder.part"/*.whl "$folder.part"
    mv "$folder.part" "$folder"
fi

say "the Megatron tests with megatron-core $version in place of $installed"
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
imported="$(python -W ignore -c 'import megatron.core; print(megatron.core.__file__)')"
case "$imported" in
    "$folder"/*) ;;
    *) say "error: megatron-core was unpacked, but $imported is what is imported"; exit 1 ;;
esac
# Tests marked `slow` are those of the trainer, which is an example for the version that pip installs.
# The fused kernels and the reader of profiles import nothing of Megatron. In one process: a second one, and its ranks, would
# import Megatron for as long as half of the tests take.
if [ $# -eq 0 ]; then
    exec python -m pytest tests/megatron -m "not slow and not heavy" \
        --ignore=tests/megatron/test_fused.py --ignore=tests/megatron/test_profiling.py
fi
parallel=()
if python -c 'import xdist' 2>/dev/null; then parallel=(-n 2 --dist loadgroup); fi
exec python -m pytest "${parallel[@]}" "$@"
