# To be sourced: unpacks what pack_vllm.py made into a scratch folder and points Python at it.
#
#   PACK    the folder that was packed
#   SITE    where to unpack            (a new folder under the system's temporary one)
SITE=${SITE:-$(mktemp -d)}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SITE" "$PACK"/wheels/*.whl
tar -C "$SITE" -xJf "$PACK/vllm_py.tar.xz"
xz -dc "$PACK/_C_stable_libtorch.abi3.so.xz" >"$SITE/vllm/_C_stable_libtorch.abi3.so"
xz -dc "$PACK/_vllm_fa3_C.abi3.so.xz" >"$SITE/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
if [[ -f $PACK/flashinfer.tar.xz ]]; then tar -C "$SITE" -xJf "$PACK/flashinfer.tar.xz"; fi
# Where vLLM says "UnspecifiedPlatform", libnvidia-ml.so was not found: its folder belongs here too.
export LD_LIBRARY_PATH="/usr/local/nvidia/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
