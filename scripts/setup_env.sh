# Sourced by quickstart.sh and test.sh: makes `python` one that can run this repository, and leaves the shell in its root.
#
#   set_up EXTRAS            # e.g. set_up train,dev
#
# An active virtual environment (or conda environment) is used as it is; otherwise .venv is made here. What is missing is
# installed, the package itself in editable mode. A stamp in the environment makes the second call take seconds.
# On a machine with a GPU, a torch that is already there is kept. Without a network, whatever can be imported is used.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$REPO"

TORCH_WITHOUT_GPU=("torch==2.13.0" "triton==3.6.0") # where pip finds torch's build for CPUs
TORCH_OF_ANY_BUILD=("torch==2.13.0" "triton>=3.6,<3.9") # builds for GPUs bring a triton of their own; gigabytes
PIP_OPTIONS=(--quiet)
OWN_ENVIRONMENT=false # whether .venv is used

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

has_gpu() { [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }
can_import() { # can_import PYTHON MODULE...: looks the modules up without running them, away from the checkout
    local py="$1"; shift
    (cd / && "$py" - "$@" <<'PY'
import importlib.util, sys
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
missing = [name for name in sys.argv[1:] if not found(name)]
print(*missing)
sys.exit(bool(missing))
PY
    )
}
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, and none is on the PATH"
}

choose_environment() {
    local base lent=false
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        say "using the active virtual environment $VIRTUAL_ENV"
        export PATH="$VIRTUAL_ENV/bin:$PATH"
    elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        say "using the active conda environment $CONDA_PREFIX"
        export PATH="$CONDA_PREFIX/bin:$PATH"
    else
        if [ ! -x .venv/bin/python ]; then
            base="$(find_python)" || exit 1
            if has_gpu && can_import "$base" torch >/dev/null; then
                say "$base has torch and this machine has a GPU: .venv will build on its packages"
                lent=true
            fi
            say "making a virtual environment in .venv with $base"
            if ! "$base" -m venv .venv; then
                rm -rf .venv
                die "$base cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"
            fi
            if $lent; then see_packages_of "$base"; fi
        else
            say "using .venv"
        fi
        export VIRTUAL_ENV="$REPO/.venv" PATH="$REPO/.venv/bin:$PATH"
        # Python compiles a module when it is first imported. pip would take a minute for thousands that never are.
        PIP_OPTIONS+=(--no-compile)
        OWN_ENVIRONMENT=true
        unset PYTHONDONTWRITEBYTECODE
    fi
    hash -r
    is_new_enough python || die "Python 3.11 or newer is needed; $(command -v python) is $(python --version 2>&1)"
}

see_packages_of() { # like --system-site-packages, but also where BASE is itself a virtual environment
    "$1" - .venv/bin/python <<'PY'
import pathlib, site, subprocess, sys, sysconfig
code = "import sysconfig; print(sysconfig.get_path('purelib'))"
target = subprocess.run([sys.argv[1], "-c", code], check=True, capture_output=True, text=True).stdout.strip()
folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
lines = [f"import site; site.addsitedir({folder!r})" for folder in folders if pathlib.Path(folder).is_dir()]
pathlib.Path(target, "base_environment.pth").write_text("\n".join(lines) + "\n")
PY
}

modules_for() { # the modules that tell whether the extras are installed
    local modules="torch numpy triton"
    case ",$1," in *,train,*) modules+=" megatron.core omegaconf typer rich tensorboard matplotlib" ;; esac
    case ",$1," in *,dev,*) modules+=" pytest hypothesis pytest_timeout xdist ruff mypy transformers" ;; esac
    echo "$modules"
}

install_all() {
    local extras="$1" constraints pinned
    constraints="$(mktemp)"
    if $OWN_ENVIRONMENT; then
        # The pip that Python brings may take half a minute longer to choose among all versions of these packages.
        python -m pip install "${PIP_OPTIONS[@]}" --upgrade pip 2>/dev/null || true
    fi
    if can_import python torch >/dev/null; then
        say "keeping the torch that is there"
    elif has_gpu; then
        say "torch comes with the rest, in the build for this machine's GPU (a few minutes the first time)"
    else
        say "installing ${TORCH_WITHOUT_GPU[*]} (no GPU here; a few minutes the first time)"
        if ! python -m pip install "${PIP_OPTIONS[@]}" "${TORCH_WITHOUT_GPU[@]}" 2>/dev/null; then
            say "pip finds no such pair; installing ${TORCH_OF_ANY_BUILD[*]}"
            python -m pip install "${PIP_OPTIONS[@]}" "${TORCH_OF_ANY_BUILD[@]}" || return 1
        fi
    fi
    python - >"$constraints" <<'PY'
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "triton"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
PY
    pinned="$(paste -sd' ' "$constraints")"
    say "installing moba_cp[$extras] and what it needs, beside ${pinned:-no torch so far}"
    python -m pip install "${PIP_OPTIONS[@]}" --constraint "$constraints" --editable ".[$extras]"
    local status=$?
    rm -f "$constraints"
    return $status
}

install_without_network() { # for an environment that holds everything already; on a GPU machine its versions are trusted
    if python -m pip install --quiet --no-index --no-build-isolation --editable ".[$1]" 2>/dev/null; then return; fi
    has_gpu && install_package_only
}

install_package_only() {
    if python -m pip install --quiet --no-deps --no-build-isolation --editable . 2>/dev/null; then
        say "installed moba_cp alone, in editable mode"
    else
        say "putting the checkout on PYTHONPATH instead of installing moba_cp"
        export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    fi
}

set_up() {
    local extras="$1" stamp key missing modules
    local begin=$SECONDS
    choose_environment
    stamp="$(python -c 'import sys; print(sys.prefix)')/.moba_cp-$extras.stamp"
    key="$(cat pyproject.toml scripts/setup_env.sh | sha256sum | cut -c1-16) $REPO"
    read -ra modules <<<"$(modules_for "$extras")"

    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && can_import python moba_cp "${modules[@]}" >/dev/null; then
        say "everything is installed ($((SECONDS - begin)) s)"
        return
    fi
    if can_import python "${modules[@]}" >/dev/null && install_without_network "$extras"; then
        say "everything moba_cp needs was there already; set-up took $((SECONDS - begin)) s"
    elif install_all "$extras"; then
        say "set-up took $((SECONDS - begin)) s"
    else
        missing="$(can_import python "${modules[@]}")" || true
        say "WARNING: could not install (no network?); going on without: ${missing:-nothing, all of it can be imported}"
        can_import python torch numpy triton >/dev/null || die "nothing runs without torch, numpy and triton"
        install_package_only
        return
    fi
    if [ -z "${PYTHONPATH:-}" ]; then
        echo "$key" >"$stamp" 2>/dev/null || true
    fi
}
