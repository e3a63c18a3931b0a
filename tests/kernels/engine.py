# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""vLLM's engine on the host, its attention computed by the emulated kernels.

    python engine.py FOLDER stock
    python engine.py FOLDER mma|wgmma|fp8 LIBRARY [v2]

LIBRARY: the emulator; head size 64 and bfloat16 are enough.
``fp8``: the kernels of ``mma`` over a KV cache in fp8.
``v2``: model runner V2 with async scheduling and drafts from the device, as on CUDA.

The backend, its metadata, the plan, the workspace and the op's arguments are those of a GPU; only
the launch goes to the emulator, and there every step is taken, since vLLM's own kernels are not
here. FOLDER gets the model and answers.json: of each turn the first token, its log-probability,
and how much of the prompt was cached. ``stock`` and ``mma`` go on with two prompts that come at
once and have their first block in common, which the second one hits in the step that computes it;
``stock`` and ``v2`` with agents that share their parent's prompt, which is computed before them.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

V2 = __name__ == "__main__" and sys.argv[4:] == ["v2"]
if V2:
    sys.path.insert(0, str(Path(__file__).parents[1] / "model_runner_v2"))
    import on_host

    on_host.allow_async_scheduling()
    on_host.skip_overflow_checks()

import torch
from cases import MOST_ERROR, bits, expected_of
from emulator import Emulator, Step
from vllm import LLM, SamplingParams
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from benchmarks.models.dummy import write_config, write_weights
from vllm_stateful.adapters.worker import attention_backend
from vllm_stateful.attention import choice, ops, shared_prefixes
from vllm_stateful.attention.oracle import append_oracle, quantize
from vllm_stateful.attention.plan import Plan

NUM_TOKENS, SESSIONS, TURNS, FIRST, ADDED, ANSWER = 1024, 2, 3, 90, 20, 6
AGENTS, PARENT, TAIL, TWINS = 3, 100, 10, 40
NUM_CTAS, NUM_DRAFTS, BLOCK = 3, 4, 32
BACKEND = "vllm_stateful.adapters.worker.attention_backend.StatefulAttentionBackend"
CALLS: Counter[str] = Counter()
WRITES: Counter[str] = Counter()  # of a layer, in front of its launch
GROUPS: Counter[int] = Counter()  # launches, by how many sequences have rows in one tile
LIBRARY = torch.library.Library("vllm_stateful", "DEF")  # its operators live as long as it does


def emulate(library: Path, kernel: str) -> None:
    """Put the backend in the place of the CPU's, and the emulator in the place of the library."""
    emulator = Emulator(library)
    LIBRARY.define("num_ctas(bool half, bool fp8, int head_size, int rows, int device) -> int")
    LIBRARY.impl("num_ctas", lambda *_: NUM_CTAS, "CompositeExplicitAutograd")
    ops.why_unavailable = lambda: ""
    ops.delta_append_attention = Launch(emulator, "mma" if kernel == "fp8" else kernel)
    attention_backend.why_not = lambda *args: args[-1].unusual
    hopper = kernel == "wgmma"
    torch.cuda.get_device_capability = lambda _: (9, 0) if hopper else (8, 0)
    if hopper:
        choice.ROWS_OF_MMA = ()
    attention_backend.StatefulImpl.do_kv_cache_update = write
    if V2:  # as if its steps with drafts were captured
        graphs = choice.Graphs(most_query_len=1 + NUM_DRAFTS, are_ours=True)
        attention_backend._graphs = lambda *_: graphs
    if kernel == "fp8":
        flash_attn.flash_attn_supports_kv_cache_dtype = lambda *_, **__: True
    shared_prefixes.MIN_KEYS = BLOCK
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)


def write(
    impl: Any,
    layer: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """vLLM's write in front of a launch, whose operator is not here."""
    if impl.kv_cache_dtype == "fp8":
        cache = cache.view(torch.float8_e4m3fn)
        k, v = quantize(k, layer._k_scale), quantize(v, layer._v_scale)
    append_oracle(cache, k, v, slot_mapping)
    WRITES[impl.kv_cache_dtype] += 1


class Launch:
    """`ops.delta_append_attention`, emulated, and compared with float64 in every layer."""

    def __init__(self, emulator: Emulator, kernel: str) -> None:
        self.emulator = emulator
        self.kernel = kernel

    def __call__(
        self,
        q: torch.Tensor,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        block_table: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        slot_mapping: torch.Tensor,
        plan: ops.DevicePlan,
        scale: float,
        *,
        soft_cap: float,
        window: int,
        scales: ops.Scales | None,
    ) -> None:
        step = Step(q, k_new, v_new, cache, block_table, query_start, seq_lens, slot_mapping, scale)
        step.window, step.soft_cap, step.scales = window, soft_cap, scales
        expected, expected_cache = expected_of(step)
        self.emulator.run(step, on_host(plan), self.kernel, plan.rows, CALLS.total())
        error = float((step.out.double() - expected).norm() / expected.norm())
        assert error <= MOST_ERROR, error
        assert torch.equal(bits(cache), bits(expected_cache))
        out.copy_(step.out)
        CALLS[f"{self.kernel}, {plan.rows} rows"] += 1
        if len(plan.groups):
            GROUPS[int(plan.groups[:, 1].max())] += 1


def on_host(plan: ops.DevicePlan) -> Plan:
    """The plan as the emulator takes it, read back from the workspace."""
    arrays = {
        name: getattr(plan, name).numpy()
        for name in ("cta_segments", "segments", "units", "groups", "members")
    }
    return Plan(**arrays, num_slots=len(plan.partial_out))


def play(folder: Path, kernel: str) -> dict[str, Any]:
    """Sessions whose turns run side by side, with chunks, decode and prefix hits."""
    write_config(folder, "tiny")
    write_weights(folder)
    drafts = {"method": "ngram_gpu", "num_speculative_tokens": NUM_DRAFTS}
    options = {"async_scheduling": True, "speculative_config": drafts} if V2 else {}
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=64,
        block_size=BLOCK,
        num_gpu_blocks_override=64,
        kv_cache_dtype="fp8" if kernel == "fp8" else "auto",
        seed=0,
        **options,
    )
    random, answers = Random(0), []
    histories: list[list[int]] = [[] for _ in range(SESSIONS)]
    for turn in range(TURNS):
        for history in histories:
            history += text(random, FIRST if turn == 0 else ADDED)
        answers += ask(llm, histories)
        for history in histories:
            # The same text on all sides, whatever they answered: bfloat16 may differ.
            history += text(random, ANSWER)
    if kernel in ("stock", "mma"):
        begin = text(random, TWINS)
        answers += ask(llm, [begin + text(random, TAIL) for _ in range(2)])
    if kernel == "stock" or V2:
        parent = text(random, PARENT)
        answers += ask(llm, [parent])
        answers += ask(llm, [parent + text(random, TAIL) for _ in range(AGENTS)])
    return {
        "answers": answers,
        "calls": dict(CALLS),
        "writes": WRITES.total(),
        "groups": dict(GROUPS),
        "steps": dict(attention_backend.STEPS),
    }


def text(random: Random, num_tokens: int) -> list[int]:
    return [random.randrange(3, NUM_TOKENS) for _ in range(num_tokens)]


def ask(llm: LLM, prompts: list[list[int]]) -> list[list[Any]]:
    """Of each answer the first token, its log-probability, and the cached tokens of the prompt."""
    params = SamplingParams(
        temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False, logprobs=1
    )
    found = []
    for answer in llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
    ):
        token, *_ = answer.outputs[0].token_ids
        logprob = answer.outputs[0].logprobs[0][token].logprob
        found.append([token, logprob, answer.num_cached_tokens])
    return found


if __name__ == "__main__":
    chosen_folder, chosen = Path(sys.argv[1]), sys.argv[2]
    if chosen != "stock":
        emulate(Path(sys.argv[3]), chosen)
    (chosen_folder / "answers.json").write_text(json.dumps(play(chosen_folder, chosen)))
