# SPDX-License-Identifier: Apache-2.0
"""Do the turns of a session find it under Ray Serve LLM, whose replicas live in Ray's processes?

    python -m benchmarks.field.ray_serve [--router hash prefix power-of-two] [--out FILE]

Two replicas of a small model with the plugin, made by ``deploy/routers/ray_serve.py``. Sixteen
sessions of six turns each, their id in ``X-Session-ID``. Counts only; nothing is timed. It needs an
environment with vLLM, this package and ``ray[serve]``; docs/routers.md says how it is made.
"""

from __future__ import annotations

import argparse
import json
import random
import runpy
import shlex
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo.machine import describe
from benchmarks.field.router_play import Conversation, play_round
from benchmarks.field.router_programs import FILES
from benchmarks.models.tiny import ensure_tiny
from benchmarks.ports import HOST, free_port

SESSIONS, TURNS = 16, 6
START_LIMIT_S = 300
ROUTERS = {
    "hash": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter",
    "prefix": "ray.serve.llm.request_router:PrefixCacheAffinityRouter",
    "power-of-two": None,
}
"""Ray's routers; without one it takes the replica with the shorter queue of two."""
ENVIRONMENT = {
    "VLLM_STATEFUL": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINE = {
    "enable_prefix_caching": True,
    "enable_prompt_tokens_details": True,
    "max_model_len": 2048,
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
}


def deployment(router: str) -> dict[str, Any]:
    """Two replicas behind one of Ray's routers."""
    from ray.serve.config import RequestRouterConfig

    made: dict[str, Any] = {"num_replicas": 2}
    if ROUTERS[router] is not None:
        made["request_router_config"] = RequestRouterConfig(request_router_class=ROUTERS[router])
    return made


def measure(router: str, model: Path) -> dict[str, Any]:
    """Start Ray with two replicas, play all sessions, and count."""
    import ray
    from ray import serve

    build = runpy.run_path(str(FILES / "ray_serve.py"))["build"]
    port = free_port()
    # Each process of an engine counts as a processor, whether there is one or not.
    ray.init(num_cpus=12, include_dashboard=False)
    try:
        serve.start(http_options={"host": HOST, "port": port})
        arguments = {
            "model": str(model),
            "engine_kwargs": ENGINE,
            "runtime_env": {"env_vars": ENVIRONMENT},
            "deployment_config": deployment(router),
            "placement_group_config": {"bundles": [{"CPU": 1}]},
        }
        serve.run(build(arguments))
        return play(f"http://{HOST}:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()


def play(url: str) -> dict[str, Any]:
    """All sessions, one turn of each in a random order, then the next; what their turns found."""
    model = _wait(url)
    run = uuid.uuid4().hex[:8]
    sessions = [
        Conversation(url, model, f"session-{run}-{number:02}", number) for number in range(SESSIONS)
    ]
    order = random.Random(0)
    for _ in range(TURNS):
        play_round(sessions, order)
    later = [turn for each in sessions for turn in each.turns[1:]]
    return {
        "later_turns": len(later),
        "found": sum(turn.has_found for turn in later),
        "prompt_tokens": sum(turn.prompt for turn in later),
        "cached_tokens": sum(turn.cached for turn in later),
        "errors": [error for turn in later for error in turn.errors],
        "header_comes_back": all(turn.echoed is not None for turn in later),
    }


def _wait(url: str) -> str:
    """Until a replica answers; the name of the model."""
    end = time.monotonic() + START_LIMIT_S
    said = "no answer"
    while time.monotonic() < end:
        try:
            model = str(httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"])
            body = {"model": model, "prompt": "Hello", "max_tokens": 1}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            if answer.is_success:
                return model
            said = answer.text[:300]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            said = repr(error)
        time.sleep(1)
    raise TimeoutError(f"Ray does not serve after {START_LIMIT_S} s: {said}")


def main() -> int:
    """Measure behind each router, print, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--router", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    parser.add_argument("--out", type=Path, default=FILES.parents[1] / "out" / "ray_serve.json")
    args = parser.parse_args()
    results = {}
    for router in args.router:
        results[router] = measure(router, ensure_tiny())
        print(router, json.dumps(results[router]), flush=True)
    command = shlex.join(["python", "-m", "benchmarks.field.ray_serve", *sys.argv[1:]])
    document = {**describe(), "command": command, "ray": version("ray"), "routers": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
