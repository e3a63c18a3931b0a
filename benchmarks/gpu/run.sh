#!/usr/bin/env bash
# On a machine with a GPU, in a checkout: three commands, each worth it alone, most valuable first.
#
#   OUT=out PACK=pack benchmarks/gpu/run.sh A    are the kernels right, and how fast are they?
#   OUT=out PACK=pack benchmarks/gpu/run.sh B    vLLM over HTTP, stock against plugin
#   OUT=out PACK=pack benchmarks/gpu/run.sh C    what the kernels' constants should be
#   OUT=out PACK=pack benchmarks/gpu/run.sh D    vLLM's answers in many configurations: those of stock?
#
#   SECONDS_IN_ALL  it ends after them, with what there is until then   (265)
#   PACK            a folder of pack_vllm.py, where vLLM or this package is not installed
#   PYTHON          the interpreter                                     (python3)
#   COMMIT          of the checkout, where git cannot say it
#
# Results are in OUT as soon as they exist; tables are printed last, and again by
# `python -m benchmarks.gpu.kernels --tables OUT` and `python -m benchmarks.gpu.serving --tables FILE`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-out} COMMIT=${COMMIT:-}
PY=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-265}
rest() { echo $((SECONDS_IN_ALL - SECONDS)); }
mkdir -p "$OUT"
if [[ -n ${PACK:-} ]]; then source benchmarks/gpu/unpack.sh || exit 1; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$PY" -c 'import importlib.metadata as m; m.version("vllm-stateful")' 2>/dev/null; then
    FOUND=$(mktemp -d)
    "$PY" -m benchmarks.gpu.as_installed "$FOUND" || exit 1
    export PYTHONPATH="$PYTHONPATH:$FOUND"
fi
echo "ready after $SECONDS s"
libraries=()
for built in "${PACK:-build}"/tuning/*.so; do
    [[ -f $built ]] && libraries+=(--library "$(basename "$built" .so)=$built")
done
case ${1:-} in
A) "$PY" -m benchmarks.gpu.kernels --seconds "$(rest)" --out "$OUT" ;;
B) "$PY" -m benchmarks.gpu.serving --seconds "$(rest)" --out "$OUT" ;;
C) "$PY" -m benchmarks.gpu.kernels --no-checks --steps sweeps "${libraries[@]}" \
    --seconds "$(rest)" --out "$OUT" ;;
D) "$PY" -m benchmarks.gpu.smoke_vllm --layers 8 --side-by-side 4 \
    --seconds "$(rest)" --out "$OUT/smoke.jsonl" ;;
*) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
