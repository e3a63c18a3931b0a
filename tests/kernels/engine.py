# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""vLLM's engine on the host, its attention computed by the emulated kernels.

    python engine.py FOLDER stock|mma|wgmma [v2]

``v2``: model runner V2 with async scheduling and drafts from the device, as on CUDA.

The backend, its metadata, the plan, the workspace and the op's arguments are those of a GPU; only
the launch goes to the emulator, and there every step is taken, since vLLM's own kernels are not
here. FOLDER gets the model and answers.json: of each turn the first token, its log-probability,
and how much of the prompt was cached.
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

V2 = __name__ == "__main__" and sys.argv[3:] == ["v2"]
if V2:
    sys.path.insert(0, str(Path(__file__).parents[1] / "model_runner_v2"))
    import on_host

    on_host.allow_async_scheduling()

import torch
from cases import MOST_ERROR, bits
from emulator import Emulator, Step
from vllm import LLM, SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from benchmarks.models.dummy import write_config, write_weights
from vllm_stateful.adapters import attention_backend
from vllm_stateful.attention import choice, ops
from vllm_stateful.attention.oracle import append_oracle, attention_oracle
from vllm_stateful.attention.plan import Plan

NUM_TOKENS, SESSIONS, TURNS, FIRST, ADDED, ANSWER = 1024, 2, 3, 90, 20, 6
NUM_CTAS, NUM_DRAFTS = 3, 4
BACKEND = "vllm_stateful.adapters.attention_backend.StatefulAttentionBackend"
CALLS: Counter[str] = Counter()
LIBRARY = torch.library.Library("vllm_stateful", "DEF")  # its operators live as long as it does


def emulate(folder: Path, kernel: str) -> None:
    """Put the backend in the place of the CPU's, and the emulator in the place of the library."""
    emulator = Emulator(folder)
    LIBRARY.define("num_ctas(bool half, bool fp8, int head_size, int rows, int device) -> int")
    LIBRARY.impl("num_ctas", lambda *_: NUM_CTAS, "CompositeExplicitAutograd")
    ops.why_unavailable = lambda: ""
    ops.delta_append_attention = Launch(emulator, kernel)
    attention_backend.why_not = lambda batch: batch.unusual
    hopper = kernel == "wgmma"
    torch.cuda.get_device_capability = lambda _: (9, 0) if hopper else (8, 0)
    if hopper:
        choice.ROWS_OF_MMA = ()
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)


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
    ) -> None:
        step = Step(q, k_new, v_new, cache, block_table, query_start, seq_lens, slot_mapping, scale)
        step.window, step.soft_cap = window, soft_cap
        expected_cache = cache.clone()
        expected = attention_oracle(
            q, k_new, v_new, cache, block_table, query_start, seq_lens, scale, window=window
        )
        append_oracle(expected_cache, k_new, v_new, slot_mapping)
        self.emulator.run(step, on_host(plan), self.kernel, plan.rows, CALLS.total())
        error = float((step.out.double() - expected).norm() / expected.norm())
        assert error <= MOST_ERROR, error
        assert torch.equal(bits(cache), bits(expected_cache))
        out.copy_(step.out)
        CALLS[f"{self.kernel}, {plan.rows} rows"] += 1


def on_host(plan: ops.DevicePlan) -> Plan:
    """The plan as the emulator takes it, read back from the workspace."""
    arrays = {
        name: getattr(plan, name).numpy()
        for name in ("cta_segments", "segments", "units", "groups", "members")
    }
    return Plan(**arrays, num_slots=len(plan.partial_out))


def play(folder: Path) -> dict[str, Any]:
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
        block_size=32,
        num_gpu_blocks_override=64,
        seed=0,
        **options,
    )
    params = SamplingParams(
        temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False, logprobs=1
    )
    random, answers = Random(0), []
    histories: list[list[int]] = [[] for _ in range(SESSIONS)]
    for turn in range(TURNS):
        for history in histories:
            added = FIRST if turn == 0 else ADDED
            history += [random.randrange(3, NUM_TOKENS) for _ in range(added)]
        prompts = [{"prompt_token_ids": list(history)} for history in histories]
        for history, answer in zip(
            histories, llm.generate(prompts, params, use_tqdm=False), strict=True
        ):
            token, *_ = answer.outputs[0].token_ids
            logprob = answer.outputs[0].logprobs[0][token].logprob
            answers.append([token, logprob, answer.num_cached_tokens])
            # The same text on all sides, whatever they answered: bfloat16 may differ.
            history += [random.randrange(3, NUM_TOKENS) for _ in range(ANSWER)]
    return {"answers": answers, "calls": dict(CALLS), "steps": dict(attention_backend.STEPS)}


if __name__ == "__main__":
    chosen_folder, chosen = Path(sys.argv[1]), sys.argv[2]
    if chosen != "stock":
        emulate(chosen_folder, chosen)
    (chosen_folder / "answers.json").write_text(json.dumps(play(chosen_folder)))
