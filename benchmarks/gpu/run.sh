#!/usr/bin/env bash
# On a machine with a GPU, in a checkout with _C.abi3.so built: are the kernels right, how fast are
# they, and does vLLM serve with the plugin? The tables come last; files go to OUT.
#
#   OUT=out benchmarks/gpu/run.sh [check] [sanitize] [kernels] [vllm]      (all but sanitize)
#
#   SECONDS_IN_ALL  of check, kernels and vllm together  (530); what does not fit is named
#   PACK    a folder of pack_vllm.py, where vLLM is not installed
#   PYTHON  the interpreter            (python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-out}
PY=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
mkdir -p "$OUT"
rest() { echo $((SECONDS_IN_ALL - SECONDS)); }
if [[ -n ${PACK:-} ]]; then source benchmarks/gpu/unpack.sh || exit 1; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$PY" -c 'import importlib.metadata as m; m.version("vllm-stateful")' 2>/dev/null; then
    FOUND=$(mktemp -d)
    "$PY" -m benchmarks.gpu.as_installed "$FOUND" || exit 1
    export PYTHONPATH="$PYTHONPATH:$FOUND"
fi
status=0
for what in "${@:-check kernels vllm}"; do
    for one in $what; do
        case $one in
        check) "$PY" -m benchmarks.gpu.check_kernels --seconds $((SECONDS_IN_ALL / 6)) >"$OUT/check.txt" 2>&1 || status=1 ;;
        sanitize)
            for tool in memcheck racecheck synccheck; do
                compute-sanitizer --tool "$tool" --error-exitcode 9 \
                    "$PY" -m benchmarks.gpu.check_kernels --cases 6 || status=1
            done >"$OUT/sanitize.txt" 2>&1 ;;
        kernels) "$PY" -m benchmarks.kernels.bench_kernels --seconds $((SECONDS_IN_ALL / 4)) \
            --out "$OUT/kernels.json" >"$OUT/kernels.txt" 2>&1 || status=1 ;;
        vllm) "$PY" -m benchmarks.gpu.smoke_vllm --seconds "$(rest)" >"$OUT/vllm.txt" 2>&1 || status=1 ;;
        *) echo "unknown: $one" >&2; exit 2 ;;
        esac
    done
done
for file in check sanitize kernels vllm; do
    [[ -f $OUT/$file.txt ]] && { echo "== $file"; tail -n 45 "$OUT/$file.txt"; }
done
exit $status
