#!/usr/bin/env bash
# Create .venv with the pinned requirements and the project (editable). Called by `make setup`.
#
#   PYTHON=/path/to/python   use this interpreter instead of the first Python >= 3.11 found
#   TORCH_VARIANT=cpu|cuda   use this build of torch instead of detecting it with nvidia-smi
#
# A stamp file named by a hash of the inputs is written last. So a second call returns at once, and a changed pin or an
# interrupted install starts from scratch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu_index=https://download.pytorch.org/whl/cpu
python=.venv/bin/python

# Concurrent makes must not build the same .venv. This file is the lock, released when the process ends.
if command -v flock >/dev/null; then
    exec 9<scripts/setup_env.sh
    flock 9
fi

variant=${TORCH_VARIANT:-}
if [ -z "$variant" ]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then variant=cuda; else variant=cpu; fi
fi
if [ ! -f "requirements/$variant.txt" ]; then
    echo "setup: TORCH_VARIANT is '$variant', expected cpu or cuda" >&2
    exit 1
fi

# The path is an input too: a virtual environment and an editable install do not survive a move.
inputs=$({ pwd; cat requirements/*.txt pyproject.toml scripts/setup_env.sh; } | cksum | cut -d ' ' -f 1)
stamp=.venv/.stamp-$variant-$inputs
if [ -f "$stamp" ] && "$python" -c '' 2>/dev/null; then exit 0; fi

# Being on PATH is not enough: a pyenv shim may fail, and Debian ships python3 without venv.
# 3.11 comes first because the pins were made with it.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}
base=
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if usable "$candidate"; then base=$candidate && break; fi
done
if [ -z "$base" ]; then
    echo "setup: found no Python >= 3.11 with venv (tried: ${PYTHON:-python3.11 python3.12 python3.13 python3})." >&2
    echo "setup: install one (on Debian or Ubuntu: apt-get install python3 python3-venv), or name it: make setup PYTHON=..." >&2
    exit 1
fi

started=$SECONDS
echo "setup: installing into .venv with $("$base" --version), torch for $variant; this takes one to ten minutes"
"$base" -m venv --clear .venv

# deepspeed compiles its kernels at first use; they are not built here.
export DS_BUILD_OPS=0
# The output of pip is shown only if it fails.
install() {
    "$python" -m pip install --disable-pip-version-check "$@" >>.venv/pip.log 2>&1 || {
        tail -n 30 .venv/pip.log >&2
        echo "setup: pip failed; its full output is in .venv/pip.log" >&2
        exit 1
    }
}

reachable() {
    "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

install "$(grep '^pip==' requirements/dev.txt)"

# torch comes first and alone, so that nothing else can be taken from the extra index. A "+cpu" build counts as
# newer than the plain one, so pip prefers it. The index is probed because pip itself would retry it for minutes.
if [ "$variant" = cpu ]; then
    torch=$(grep '^torch==' requirements/cpu.txt)
    if reachable "$cpu_index/torch/"; then
        install --no-deps --extra-index-url "$cpu_index" "$torch"
    else
        echo "setup: $cpu_index does not respond, so torch is installed from the default index (maybe with CUDA, 3 GB)"
    fi
fi
# Packages without a wheel (deepspeed, antlr4) are built with the setuptools pinned here, not with the newest.
install --build-constraint requirements/cpu.txt \
    -r "requirements/$variant.txt" -r requirements/captions.txt -r requirements/dev.txt
# All dependencies are installed by now: no dependencies, and setuptools as pinned.
install --no-deps --no-build-isolation --editable .

"$python" -m pip check
touch "$stamp"
echo "setup: done in $((SECONDS - started)) s: torch $("$python" -c 'import torch; print(torch.__version__)')"
if ! java -version >/dev/null 2>&1; then
    echo "setup: found no Java: caption scores raise an error and their tests are skipped until it is installed" \
        "(Debian, Ubuntu: apt-get install default-jre-headless)"
fi
