#!/usr/bin/env bash
# Find out on a machine without a GPU what would be missing on one with it and without a network.
#
#   benchmarks/gpu/rehearse.sh          make the pack, unpack it as there, load, import and configure all
#   benchmarks/gpu/rehearse.sh quick    what the repository's environment alone can tell, in a minute
#
# Packs, and builds an environment with the packages of rehearsal/machine.txt: that machine's, and no others.
# In it a copy of the checkout runs with what unpack.sh makes, and with stubs for NVIDIA's driver. Ends with
# status 1 where anything is missing that rehearsal/allowed.txt does not name.
#
#   PYTHON312   that machine's Python                      (python3.12)
#   CACHE       the environment, the pack and what is made (.cache/rehearse); 8 GB
#   VENV        the environment of .ci/setup.sh, with uv   (.venv)
#   PACK_ARGS   more for pack_vllm.py, like --moe or --traces FILE
#
# Needs gcc, nvcc, cmake and a package index that pip is configured with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV=${VENV:-.venv}
if [[ ${1:-} == quick ]]; then exec "$VENV/bin/python" -m pytest -q tests/gpu_scripts/test_rehearsal.py; fi
[[ $# == 0 ]] || { sed -n '2,5p' "$0" >&2; exit 2; }
CACHE=${CACHE:-.cache/rehearse}
LIMIT_MIB=64
mkdir -p "$CACHE"
CACHE=$(cd "$CACHE" && pwd)
ENV=$CACHE/env
MACHINE=benchmarks/gpu/rehearsal/machine.txt
say() { printf '%4ss  %s\n' "$SECONDS" "$*"; }

say "environment"
if [[ ! -f $ENV/.made || $(<"$ENV/.made") != "$(<"$MACHINE")" ]]; then
    python=${PYTHON312:-$(command -v python3.12 || true)}
    [[ -n $python ]] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
        { echo "no Python 3.12 was found; name one as PYTHON312" >&2; exit 1; }
    rm -rf "$ENV"
    "$python" -m venv "$ENV"
    "$ENV/bin/python" -m pip install -q --no-deps -r "$MACHINE" 2>&1 | { grep -v WARNING || true; }
    cp "$MACHINE" "$ENV/.made"
fi

say "pack"
[[ -d .cache/models/smollm2-135m ]] || "$VENV/bin/python" -m benchmarks.models.smollm2 >"$CACHE/model.log" 2>&1
read -ra more <<<"${PACK_ARGS:-}"
"$VENV/bin/python" -m benchmarks.gpu.pack_vllm "$CACHE/pack" --kernels "${more[@]}" 2>&1 | { grep -v WARNING || true; }

say "checkout"
rm -rf "$CACHE/checkout" "$CACHE/site" "$CACHE/out"
mkdir -p "$CACHE/checkout" "$CACHE/out"
git ls-files -z --cached --others --exclude-standard | while IFS= read -rd '' file; do
    [[ ! -f $file ]] || printf '%s\0' "$file"
done | tar -c --null -T - | tar -x -C "$CACHE/checkout"
bytes=$(du -bs "$CACHE/checkout" "$CACHE/pack" | awk '{ sum += $1 } END { print sum }')

say "unpack"
cd "$CACHE/checkout"
export PACK=$CACHE/pack SITE=$CACHE/site PYTHON=$ENV/bin/python
export PATH="$ENV/bin:$PATH"
unset VIRTUAL_ENV
source benchmarks/gpu/unpack.sh
source benchmarks/gpu/unpack.sh # finds it
export SITE PYTHONPATH="$PWD:$PYTHONPATH"
"$PYTHON" -m benchmarks.gpu.as_installed "$CACHE/out/found" >/dev/null
export PYTHONPATH="$PYTHONPATH:$CACHE/out/found"
"$PYTHON" -m benchmarks.gpu.rehearsal.stubs "$CACHE/out/driver" \
    "$SITE"/vllm/*.so "$SITE"/vllm/vllm_flash_attn/*.so vllm_stateful/*.so "$ENV"/lib/python3.12/site-packages/torch/lib/*.so
export LD_LIBRARY_PATH="$CACHE/out/driver:$LD_LIBRARY_PATH"

RESULTS=$CACHE/out/results.jsonl
status=0
# torch takes NVML's word then that a device is here, and with it Triton and vLLM do.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
export VLLM_CACHE_ROOT=$CACHE/out/vllm TRITON_CACHE_DIR=$CACHE/out/triton
check() { # NAME PART [VARIABLE=VALUE...]: one process
    say "$1"
    env "${@:3}" timeout 300 "$PYTHON" -m benchmarks.gpu.rehearsal.check "$2" --out "$RESULTS" >"$CACHE/out/$1.log" 2>&1 || {
        say "$1 ended with status $?; the end of $CACHE/out/$1.log:"
        tail -n 15 "$CACHE/out/$1.log"
        status=1
    }
}
check libraries libraries
check requirements requirements
check imports imports
check engine engine
check engine-plugin engine VLLM_STATEFUL=1 VLLM_STATEFUL_ATTENTION=on
check engine-v1 engine VLLM_STATEFUL=1 VLLM_USE_V2_MODEL_RUNNER=0
check server server
check server-plugin server VLLM_STATEFUL=1

say "command line"
timeout 120 "$PYTHON" -m vllm.entrypoints.cli.main serve --help >"$CACHE/out/help.log" 2>&1 || {
    status=1
    tail -n 15 "$CACHE/out/help.log"
}

# The tables of recorded results, where a script has them.
for name in kernels serving; do
    recorded=benchmarks/gpu/recorded
    shopt -s nullglob
    files=("$recorded/$name"*.jsonl)
    if [[ ! -f benchmarks/gpu/$name.py || ${#files[@]} == 0 ]]; then
        say "tables of $name: skipped, no script or nothing recorded"
        continue
    fi
    say "tables of $name"
    what=${files[0]}
    [[ $name != kernels ]] || what=$recorded
    "$PYTHON" -m "benchmarks.gpu.$name" --tables "$what" >"$CACHE/out/tables_$name.log" 2>&1 || {
        status=1
        tail -n 15 "$CACHE/out/tables_$name.log"
    }
done

say "summary"
"$PYTHON" -m benchmarks.gpu.rehearsal.summary "$RESULTS" --bytes "$bytes" --limit "$LIMIT_MIB" || status=1
say "$([[ $status == 0 ]] && echo nothing is missing || echo FINDINGS)"
exit $status
