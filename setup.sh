#!/bin/sh
# Make the virtual environment and install Bulkhead into it. Called by make; may be run again at any time.
# usage: setup.sh [dev]      environment: PYTHON, VENV, TORCH
set -eu
python=${PYTHON:-python3}
venv=${VENV:-.venv}
torch=${TORCH:?}
stage=${1:-run}

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python was not found: install Python 3.11 or newer, or run: make PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Bulkhead needs Python 3.11 or newer; run: make PYTHON=/path/to/python"

if [ ! -x "$venv/bin/python" ]; then
    say "creating the virtual environment in $venv"
    # Debian keeps ensurepip in python3-venv; without that package, the system's pip fills an empty environment.
    "$python" -m venv "$venv" 2>/dev/null || {
        rm -rf "$venv"
        "$python" -m venv --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install --quiet pip ||
            fail "no pip for $python: install the package python3-pip (or python3-venv)"
    }
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# pip install that shows what it is downloading, one line a package, and fails as pip does.
install() {
    { pip install "$@" 2>&1 || echo "$?" >"$venv/.failed"; } |
        sed -n -e 's/^ *Downloading /setup:   /p' -e '/^ERROR/p' -e '/^WARNING: Retrying/p'
    if [ -e "$venv/.failed" ]; then
        rm -f "$venv/.failed"
        fail "pip could not install $*: see the lines above; check the network and the free disk space, then try again"
    fi
}

if [ ! -e "$venv/.torch-$torch" ]; then
    say "installing PyTorch $torch (about 200 MB)"
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        say "a GPU was found: installing PyTorch $torch with CUDA (several GB)"
        install "torch==$torch" -c constraints.txt
    elif pip install --quiet "torch==$torch+cpu" -c constraints.txt 2>/dev/null; then
        say "PyTorch $torch for the CPU is installed"
    else
        say "no CPU build of it here: if your index has only CUDA builds, this downloads several GB"
        say "(a CPU build is found when PIP_EXTRA_INDEX_URL names an index that carries one)"
        install "torch==$torch" -c constraints.txt
    fi
    : >"$venv/.torch-$torch"
fi

if [ ! -e "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ] || [ constraints.txt -nt "$venv/.installed" ]; then
    say "installing Bulkhead and what it needs"
    install -e . -c constraints.txt
    touch "$venv/.installed"
fi
if [ "$stage" = dev ]; then
    say "installing what the tests need"
    install -e '.[dev]' -c constraints.txt
    touch "$venv/.installed-dev"
fi
