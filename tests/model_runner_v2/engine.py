# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine with model runner V2 and async scheduling, as on CUDA, on the host.

    python engine.py FOLDER stock|plugin|drafts|adaptive|crowded|grammar|head|head-alone

FOLDER gets the model and answers.json. ``head`` has an EAGLE head of random weights and drafts from
sessions beside it, ``head-alone`` only the head. The other four draft on the device; ``adaptive``
lets vLLM choose which drafts are worth it, ``crowded`` has too few blocks for its requests and
computes prompts in chunks, ``grammar`` has a tokenizer (the larger vocabulary takes longer).
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import on_host

SIDE = sys.argv[2] if __name__ == "__main__" else "stock"
if SIDE.startswith("head"):
    os.environ["VLLM_STATEFUL_DRAFTS"] = "on" if SIDE == "head" else "off"
if SIDE != "stock":
    os.environ |= {
        "VLLM_STATEFUL": "1",
        "VLLM_STATEFUL_STRICT": "1",
        "VLLM_STATEFUL_CHECK_INVARIANTS": "1",
    }

import numpy as np
import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from benchmarks.models.dummy import SHAPES, write_config, write_weights
from benchmarks.models.tiny import ensure_tiny
from vllm_stateful.adapters.engine import device_drafts
from vllm_stateful.adapters.slots import on_request
from vllm_stateful.adapters.worker import lookup_speculator
from vllm_stateful.compat.ledger import patch_of

NUM_TOKENS, BLOCK = 64, 32
SESSIONS, TURNS, SYSTEM, FIRST, ADDED, ANSWER, SAID = 3, 3, 40, 30, 20, 14, 24
NUM_DRAFTS, TEMPERATURE = 6, 0.5
NUM_SAMPLED = int(os.environ.get("STATEFUL_SAMPLED", "60"))
SHAPES["small"] = SHAPES["tiny"] | {"hidden_size": 128, "vocab_size": NUM_TOKENS}
STEPS: list[int] = []
"""Drafts that each step verifies."""
WRITTEN: list[int] = []
"""Ids that came to the worker as arrays."""


def engine(folder: Path, **options: Any) -> LLM:
    """A small random model."""
    on_host.allow_async_scheduling()
    on_host.skip_overflow_checks()
    for module in (device_drafts, lookup_speculator):  # fewer programs to interpret
        module.BUFFER_TOKENS, module.REGION_TOKENS = 2048, 512
    options = {"num_gpu_blocks_override": 64, "skip_tokenizer_init": True, **options}
    if SIDE in ("drafts", "adaptive", "crowded", "grammar"):
        options["speculative_config"] = {
            "method": "ngram_gpu",
            "num_speculative_tokens": NUM_DRAFTS,
        }
    if SIDE.startswith("head"):
        head = folder / "head"
        head.mkdir(exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (head / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        options["speculative_config"] = {
            "method": "eagle",
            "model": str(head),
            "num_speculative_tokens": NUM_DRAFTS,
            "draft_load_config": {"load_format": "dummy"},
        }
    if SIDE == "crowded":
        options |= {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 48}
    made = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=320,
        max_num_seqs=4,
        block_size=BLOCK,
        max_logprobs=NUM_TOKENS,
        async_scheduling=True,
        seed=0,
        **options,
    )
    core = made.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, AsyncScheduler)
    assert core.batch_queue_size == 2
    runner = core.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, GPUModelRunner)
    if SIDE == "adaptive":
        verify_adaptively(runner)
    return made


def verify_adaptively(runner: GPUModelRunner) -> None:
    """What vLLM sets up while it captures CUDA graphs: a row costs a fifth of a step here."""
    manager = AdaptiveVerificationManager(
        runner.req_states, runner.input_buffers.query_start_loc, 1, max_total_logits=10_000
    )
    costs = [(rows, 1.0 + rows / 5) for rows in range(1, 100)]
    manager.set_cost_curves([(1, 0.0)], costs)
    choose = manager.get_num_tokens

    def noting(num_tokens: dict[str, int], drafts: dict[str, list[int]]) -> int:
        chosen = choose(num_tokens, drafts)
        STEPS[-1] = chosen - sum(num_tokens.values()) + sum(map(len, drafts.values()))
        return chosen

    manager.get_num_tokens = noting
    runner.adaptive_verification = manager
    runner.rejection_sampler.enable_adaptive_verification = True


def count_steps() -> None:
    """Note what each step verifies."""
    stock = Scheduler._update_after_schedule

    def noting(self: Any, output: Any) -> None:
        stock(self, output)
        if output.num_scheduled_tokens:
            STEPS.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))

    Scheduler._update_after_schedule = noting  # type: ignore[method-assign]


def greedy(num_tokens: int = ANSWER, **options: Any) -> SamplingParams:
    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "detokenize": False,
            **options,
        }
    )


def ask(llm: LLM, prompts: list[list[int]], params: Any, **more: Any) -> list[list[int]]:
    """The answers, and how much of each prompt was cached, as its last element."""
    asked = [TokensPrompt(prompt_token_ids=prompt, **more) for prompt in prompts]
    answers = llm.generate(asked, params, use_tqdm=False)
    return [[*answer.outputs[0].token_ids, answer.num_cached_tokens or 0] for answer in answers]


def text(random: Random, num: int) -> list[int]:
    return [random.randrange(3, NUM_TOKENS) for _ in range(num)]


def turns(llm: LLM) -> list[list[int]]:
    """Sessions of one agent side by side."""
    random, answers = Random(0), []
    system = text(random, SYSTEM)
    histories = [system + text(random, FIRST) for _ in range(SESSIONS)]
    for _ in range(TURNS):
        said = ask(llm, [list(history) for history in histories], greedy())
        for history, (*tokens, _cached) in zip(histories, said, strict=True):
            history += tokens + text(random, ADDED)
        answers += said
    return answers


def options(llm: LLM) -> list[list[int]]:
    """What a request may ask for beside."""
    random = Random(1)
    wanted = [
        greedy(repetition_penalty=1.3),
        greedy(presence_penalty=0.7, frequency_penalty=0.4),
        greedy(stop_token_ids=list(range(3, 20))),
        greedy(min_tokens=6, stop_token_ids=list(range(3, 40))),
        greedy(logprobs=2),
        greedy(max_tokens=1),
        greedy(max_tokens=2, extra_args={"stateful_drafts": 0}),
        greedy(allowed_token_ids=list(range(10, 20))),
    ]
    prompts = [text(random, 9) * 4 for _ in wanted]
    return ask(llm, prompts, wanted)


def processed(llm: LLM) -> list[list[int]]:
    """What vLLM refuses beside drafts. A ``min_p`` of 1 leaves the likeliest token alone."""
    wanted = [
        greedy(SAID, logit_bias={5: 2.0, 9: -100.0}),
        greedy(SAID, logit_bias={7: 100.0}),
        greedy(SAID, temperature=1.0, seed=3, min_p=1.0),
        greedy(SAID),
    ]
    prompt = text(Random(11), 9) * 4
    return [said for _ in range(2) for said in ask(llm, [prompt] * len(wanted), wanted)]


def grammars(llm: LLM) -> list[str]:
    """Answers that a grammar bounds, twice: the second time they can be drafted."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = [{"regex": "[ab]{4,8}"}, {"json": schema}, {"choice": ["one of these", "or this"]}]
    prompts = [
        {"prompt": f"You are an agent. Say it: {number}", "cache_salt": "us"} for number in range(3)
    ]
    params = [
        SamplingParams(
            temperature=0, max_tokens=16, structured_outputs=StructuredOutputsParams(**each)
        )
        for each in wanted
    ]
    return [
        answer.outputs[0].text
        for _ in range(2)
        for answer in llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    ]


def said_before(llm: LLM) -> dict[str, Any]:
    """Steps for one prompt: the first time, again, again without drafts, for another tenant."""
    prompt, steps, answers = text(Random(5), 50), {}, []
    for name, salt, wish in (
        ("first", "us", None),
        ("again", "us", None),
        ("unwanted", "us", {"stateful_drafts": 0}),
        ("elsewhere", "them", None),
    ):
        before = len(STEPS)
        *tokens, _ = ask(llm, [prompt], greedy(SAID, extra_args=wish), cache_salt=salt)[0]
        answers.append(tokens)
        steps[name] = [len(STEPS) - before, sum(STEPS[before:])]
    return {"answers": answers, "steps": steps}


def long_answers(llm: LLM) -> list[list[int]]:
    """More tokens at once than a crowded cache holds."""
    random = Random(3)
    return ask(llm, [text(random, 62) for _ in range(4)], greedy(45))


def sampled(llm: LLM) -> list[list[int]]:
    """Two tokens that are not greedy, for one prompt."""
    params = [greedy(2, temperature=TEMPERATURE, seed=seed) for seed in range(NUM_SAMPLED)]
    prompts = [text(Random(7), 60)] * NUM_SAMPLED
    return [tokens[:2] for tokens in ask(llm, prompts, params)]


def chances(llm: LLM) -> list[list[float]]:
    """How probable each second token is behind each first, as `sampled` draws them."""
    prompt = text(Random(7), 60)

    def following(prompts: list[list[int]]) -> torch.Tensor:
        asked = [TokensPrompt(prompt_token_ids=each) for each in prompts]
        answers = llm.generate(asked, greedy(1, logprobs=NUM_TOKENS), use_tqdm=False)
        rows = [answer.outputs[0].logprobs[0] for answer in answers]
        logprobs = torch.tensor([[row[i].logprob for i in range(NUM_TOKENS)] for row in rows])
        return (logprobs / TEMPERATURE).softmax(1)

    first = following([prompt])[0]
    second = following([[*prompt, token] for token in range(NUM_TOKENS)])
    return (first[:, None] * second).tolist()


def send_arrays() -> None:
    """Prompts as arrays, as `PromptReceiver` labels them in an engine core of its own process."""
    stock = Scheduler.add_request

    def add_request(self: Any, request: Any) -> None:
        found = on_request(request)
        found.prompt = np.array(request.prompt_token_ids, np.int32)
        found.is_array_sent = True
        stock(self, request)

    Scheduler.add_request = add_request  # type: ignore[method-assign]
    write = patch_of("staged-ids").calls[0].load()

    def noting(table: Any, index: int, start: int, ids: Any) -> None:
        WRITTEN.append(len(ids))
        write(table, index, start, ids)

    patch_of("staged-ids").calls[0].set(noting)


def count_preemptions(scheduler: Any) -> list[int]:
    """An element for each."""
    preempted: list[int] = []
    preempt = scheduler._preempt_request

    def noting(*args: Any, **named: Any) -> Any:
        preempted.append(1)
        return preempt(*args, **named)

    scheduler._preempt_request = noting
    return preempted


def play(folder: Path) -> dict[str, Any]:
    """All that one side is asked."""
    if SIDE == "grammar":
        llm = engine(ensure_tiny(), skip_tokenizer_init=False)
        found: dict[str, Any] = {"grammars": grammars(llm)}
        return found | {"stats": stats(llm)}
    write_config(folder, "small")
    write_weights(folder)
    llm = engine(folder)
    if SIDE in ("plugin", "crowded"):
        send_arrays()
    preempted = count_preemptions(llm.llm_engine.engine_core.engine_core.scheduler)
    found = {"turns": turns(llm), "options": options(llm), "said_before": said_before(llm)}
    if not SIDE.startswith("head"):
        before = sum(STEPS)
        found |= {"processed": processed(llm), "verified beside": sum(STEPS) - before}
    if SIDE in ("stock", "crowded"):
        found["long answers"] = long_answers(llm)
    if SIDE == "stock":
        return found | {"chances": chances(llm)}
    if SIDE == "drafts":
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        before = runner.speculator.counts.clone()
        found["sampled"] = sampled(llm)
        found["verified"] = (runner.speculator.counts - before).sum(1).tolist()
    return found | {"preempted": len(preempted), "stats": stats(llm), "written": WRITTEN}


def stats(llm: LLM) -> dict[str, Any]:
    return dict(llm.llm_engine.engine_core.engine_core.scheduler.stateful("stats", {}))


if __name__ == "__main__":
    count_steps()
    place = Path(sys.argv[1])
    (place / "answers.json").write_text(json.dumps(play(place)))
