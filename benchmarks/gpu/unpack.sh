# To be sourced: unpacks what pack_vllm.py made and points Python at it. Ends with status 1 and a message
# where that is not possible. A second call finds what the first one made.
#
#   PACK    the folder that was packed
#   SITE    where to unpack            (stateful-site in the system's temporary folder)
#   PYTHON  the interpreter            (python3)
#
# Sets REPLAY, the folder with a tokenizer and recorded traces, beside what Python and vLLM read.
SITE=${SITE:-${TMPDIR:-/tmp}/stateful-site}
PACK=$(cd "$PACK" && pwd) || return 1
"${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/unpack.py" "$PACK" "$SITE" || return 1
# Where vLLM says "UnspecifiedPlatform", libnvidia-ml.so was not found: its folder belongs here too.
export LD_LIBRARY_PATH="/usr/local/nvidia/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
export REPLAY=$PACK/replay
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
