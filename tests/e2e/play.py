# SPDX-License-Identifier: Apache-2.0
"""Plays agent conversations through one in-process vLLM engine and writes down every turn.

Run as a program, once with the plugin and once without; the tests compare what came out. A
conversation is a list of token ids: the user and tool messages are recorded ones, the answers are
the model's own (greedy), so both sides see the same prompts as long as they answer the same.

    python tests/e2e/play.py --model DIR --scenario main --out FILE [--plugin] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "data" / "conversations.jsonl"


@dataclass
class Turn:
    """One turn as it was answered."""

    name: str
    prompt: list[int]
    answer: list[int]
    num_cached: int
    first_logprobs: dict[int, float]
    aborted: bool = False
    num_preemptions: int = 0


@dataclass
class Agent:
    """One conversation: where its messages come from, and its history in token ids."""

    name: str
    messages: Iterator[str]
    history: list[int] = field(default_factory=list)
    session_id: str | None = None
    cache_salt: str | None = None


def offloading(num_bytes: int) -> dict[str, Any]:
    """vLLM's CPU offload tier with our eviction policy, and a worker that runs on a CPU."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": num_bytes,
            "spec_name": "HostCopySpec",
            "spec_module_path": "host_copy",
            "eviction_policy": "StatefulCachePolicy",
            "cache_policy_module_path": "vllm_stateful.adapters.offload_policy",
        },
    }


def several(*connectors: dict[str, Any]) -> dict[str, Any]:
    """KV connectors in a ``MultiConnector``."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": connectors},
    }


class Player:
    """One engine and everything that was said to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM

        options: dict[str, Any] = {}
        if args.num_blocks:
            options["num_gpu_blocks_override"] = args.num_blocks
        if args.speculate:
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "prompt_lookup_max": 4,
            }
        if args.session_drafts:
            options["speculative_config"] = {
                "method": "custom_class",
                "num_speculative_tokens": 16,
                "model": "vllm_stateful.adapters.speculation.SessionDrafter",
            }
        if args.offload:
            tier = offloading(args.offload)
            options["kv_transfer_config"] = several(tier, tier) if args.several else tier
        self.llm = LLM(
            args.model,
            dtype=args.dtype,
            max_model_len=min(4096, (args.num_blocks - 1) * args.block_size)
            if args.num_blocks
            else 4096,
            max_num_seqs=8,
            block_size=args.block_size,
            enforce_eager=True,
            disable_log_stats=False,
            **options,
        )
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.tokenizer = self.llm.get_tokenizer()
        self.max_tokens = args.max_tokens
        self.logprobs = args.logprobs
        self.turns: list[Turn] = []
        self._preemptions: dict[str, int] = {}
        self._watch_preemptions()
        self.pinned_prompts: dict[str, list[int]] = {}
        if args.prompts:
            recorded = json.loads(Path(args.prompts).read_text())["turns"]
            self.pinned_prompts = {turn["name"]: turn["prompt"] for turn in recorded}

    def _watch_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> None:
            name = request.request_id.rsplit("-", 1)[0]
            self._preemptions[name] = self._preemptions.get(name, 0) + 1
            preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = counting

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def play(self, *said: tuple[Agent, str], abort_after: int = 0, max_tokens: int = 0) -> None:
        """Send one turn of each agent at the same time, and wait for all."""
        open_turns = {}
        for agent, turn_name in said:
            open_turns[turn_name] = self._send(agent, turn_name, max_tokens or self.max_tokens)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                agent, turn = open_turns[output.request_id]
                self._read(turn, output)
                if abort_after and len(turn.answer) >= abort_after and not turn.aborted:
                    self.engine.abort_request([output.request_id])
                    turn.aborted = True
        for agent, turn in open_turns.values():
            agent.history = turn.prompt + turn.answer
            turn.num_preemptions = self._preemptions.pop(turn.name, 0)
            self.turns.append(turn)

    def _send(self, agent: Agent, name: str, max_tokens: int) -> tuple[Agent, Turn]:
        from vllm import SamplingParams

        prompt = self.pinned_prompts.get(name) or agent.history + self.encode(next(agent.messages))
        turn = Turn(name, prompt, [], 0, {})
        params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=self.logprobs)
        tokens: dict[str, Any] = {"prompt_token_ids": prompt}
        if agent.cache_salt:
            tokens["cache_salt"] = agent.cache_salt
        self.engine.add_request(name, tokens, params, session_id=agent.session_id)
        return agent, turn

    def _read(self, turn: Turn, output: Any) -> None:
        (completion,) = output.outputs
        turn.answer = list(completion.token_ids)
        turn.num_cached = output.num_cached_tokens or 0
        if completion.logprobs and not turn.first_logprobs:
            first = completion.logprobs[0]
            turn.first_logprobs = {token: entry.logprob for token, entry in first.items()}

    def report(self) -> dict[str, Any]:
        stats, pool = {}, {}
        if hasattr(self.scheduler, "stateful"):
            from vllm_stateful.adapters.engine.invariants import check_pool

            for residency in self.scheduler.kv_cache_manager.store.residencies():
                self.scheduler.kv_cache_manager.store.close(residency.session)
            pool = check_pool(self.scheduler)
            stats = self.scheduler.stateful("stats", {})
        return {
            "scheduler": type(self.scheduler).__name__,
            "turns": [asdict(turn) for turn in self.turns],
            "stats": stats,
            "pool_after_close": pool,
        }


def conversations() -> list[tuple[str, list[str]]]:
    """Name and rendered new text of each turn, as ChatML."""
    loaded = []
    for line in DATA.read_text().splitlines():
        row = json.loads(line)
        texts = []
        for index, messages in enumerate(row["turns"]):
            text = "" if index else f"<|im_start|>system\n{row['system']}<|im_end|>\n"
            for said in messages:
                text += f"<|im_start|>{said['role']}\n{said['content']}<|im_end|>\n"
            texts.append(text + "<|im_start|>assistant\n")
        loaded.append((row["id"], texts))
    return loaded


def agents(with_ids: Callable[[int], bool]) -> list[Agent]:
    return [
        Agent(name, iter(texts), session_id=f"session-{name}" if with_ids(index) else None)
        for index, (name, texts) in enumerate(conversations())
    ]


def scenario_main(player: Player) -> None:
    """48 recorded turns interleaved; then an edit, a fork in three, an abort, two tenants."""
    playing = agents(lambda index: index % 2 == 0)
    for agent in playing:  # the first prompts of some are alike: forks
        player.play((agent, f"{agent.name}/0"))
    for number in range(1, 7):
        for together in (playing[:3], playing[3:]):
            player.play(*((agent, f"{agent.name}/{number}") for agent in together))
    player.play(*((agent, f"{agent.name}/7") for agent in playing))

    edited, forked, aborted = playing[0], playing[2], playing[4]
    middle = len(edited.history) // 2
    edited.history[middle : middle + 5] = player.encode(" the tool result was dropped here")
    edited.messages = iter(["<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"] * 2)
    player.play((edited, "edited/0"))
    player.play((edited, "edited/1"))

    children = [
        Agent(
            f"child-{n}",
            iter([f"<|im_start|>user\nTask {n}: continue.<|im_end|>\n<|im_start|>assistant\n"] * 2),
            list(forked.history),
            forked.session_id,
        )
        for n in range(3)
    ]
    for number in range(2):
        player.play(*((child, f"{child.name}/{number}") for child in children))

    aborted.messages = iter(["<|im_start|>user\nOnce more.<|im_end|>\n<|im_start|>assistant\n"] * 3)
    before = list(aborted.history)
    player.play((aborted, "aborted/0"), abort_after=3)
    aborted.history = before
    player.play((aborted, "aborted/1"))
    player.play((aborted, "aborted/2"))

    texts = dict(conversations())["intercode-sql-12"]
    tenants = [
        Agent(f"tenant-{salt}", iter(texts), [], "the-same-session-id", salt) for salt in "ab"
    ]
    for number in range(3):
        for tenant in tenants:
            player.play((tenant, f"{tenant.name}/{number}"))


def scenario_pressure(player: Player) -> None:
    """Six agents at once in a KV cache that holds about two: turns are preempted."""
    playing = agents(lambda index: index % 2 == 0)
    for number in range(4):
        player.play(*((agent, f"{agent.name}/{number}") for agent in playing), max_tokens=48)


def scenario_many(player: Player) -> None:
    """200 sessions of two turns over a KV cache that holds about 20 of them."""
    random_numbers = random.Random(0)
    opening = "You are agent number {}. " + "Be brief. " * 20
    sessions = [
        Agent(f"s{n}", iter([opening.format(n), " Go on." * 10]), [], f"session-{n:06d}")
        for n in range(200)
    ]
    for number in range(2):
        random_numbers.shuffle(sessions)
        for start in range(0, 200, 25):
            group = sessions[start : start + 25]
            player.play(*((agent, f"{agent.name}/{number}") for agent in group), max_tokens=4)


SCENARIOS = {"main": scenario_main, "pressure": scenario_pressure, "many": scenario_many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), default="main")
    parser.add_argument("--out", required=True)
    parser.add_argument("--plugin", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--logprobs", type=int, help="of so many tokens; compiles for some seconds")
    parser.add_argument("--prompts", help="replay the prompts of this earlier result")
    parser.add_argument("--offload", type=int, default=0, help="bytes of a CPU offload tier")
    parser.add_argument("--several", action="store_true", help="two such tiers at once")
    parser.add_argument("--session-drafts", action="store_true", help="with the plugin's drafts")
    parser.add_argument("--speculate", action="store_true", help="with vLLM's ngram drafts")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_STATEFUL"] = "1" if args.plugin else "0"
    if args.plugin:
        os.environ["VLLM_STATEFUL_CHECK_INVARIANTS"] = "1"
    player = Player(args)
    SCENARIOS[args.scenario](player)
    Path(args.out).write_text(json.dumps(player.report()))


if __name__ == "__main__":
    main()
