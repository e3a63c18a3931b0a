# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's KV cache groups can be continued, and why others cannot."""

from types import SimpleNamespace
from typing import Any

import pytest
from recorded_engine import Engine
from simulated_connectors import several
from simulated_groups import CHUNK, WINDOW, spec_of
from simulated_lmcache import lmcache, stand_in
from simulated_tier import offloading
from vllm.v1.core.single_type_kv_cache_manager import (
    CrossAttentionManager,
    FullAttentionManager,
    MambaManager,
    RSWAManager,
)

from vllm_stateful.adapters.engine.connectors import unsupported_connector
from vllm_stateful.adapters.engine.kv_groups import group_of, kinds_of
from vllm_stateful.errors import UnsupportedError
from vllm_stateful.prefix.groups import ChunkGroup, FullGroup, StateGroup, WindowGroup

stand_in()


def test_each_kind_is_told_from_its_manager() -> None:
    engine = Engine(num_blocks=50, kinds=("full", "window", "chunk", "state"))
    groups = [group_of(each) for each in engine.manager.coordinator.single_type_managers]
    assert groups == [
        FullGroup(4),
        WindowGroup(4, window=WINDOW),
        ChunkGroup(4, chunk=CHUNK),
        StateGroup(4),
    ]
    assert kinds_of(groups) == "1 full, 2 window, 1 state"


def made(manager: type, spec: Any, **more: Any) -> Any:
    found = object.__new__(manager)
    found.__dict__ |= {"kv_cache_spec": spec, "block_size": 4, **more}
    return found


class Compressed(type(spec_of("full", 4))):  # type: ignore[misc]
    """Looks like full attention to whoever asks for the base class only."""


@pytest.mark.parametrize(
    ("manager", "reason"),
    [
        (made(RSWAManager, spec_of("full", 4)), "kept by a RSWAManager"),
        (made(CrossAttentionManager, spec_of("full", 4)), "kept by a CrossAttentionManager"),
        (
            made(FullAttentionManager, object.__new__(Compressed)),
            "a Compressed kept by a FullAttentionManager",
        ),
        (made(MambaManager, spec_of("state", 4), mamba_cache_mode="all"), "the mode 'all'"),
    ],
    ids=["gaps", "cross attention", "a spec that is not known", "states at every block"],
)
def test_what_is_not_known_is_named(manager: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        group_of(manager)


KINDS = {
    "full": ([FullGroup(4)], False),
    "states": ([FullGroup(4), StateGroup(4)], False),
    "head": ([FullGroup(4)], True),
}


def asked_of(connector: Any, kind: str) -> str | None:
    groups, use_eagle = KINDS[kind]
    scheduler: Any = SimpleNamespace(
        connector=connector, use_eagle=use_eagle, num_prefill_lookahead=int(use_eagle)
    )
    return unsupported_connector(scheduler, groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tiers", [offloading(9), several(offloading(9), offloading(9, "lru"))], ids=["one", "two"]
)
def test_offload_tiers_are_on_beside_every_kind(tiers: Any, kind: str) -> None:
    connector = Engine(num_blocks=50, kv_transfer=tiers).scheduler.connector
    assert asked_of(connector, kind) is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("full", None),
        ("states", "MultiConnector beside windows or states"),
        ("head", "MultiConnector beside a draft head"),
    ],
)
def test_lmcache_is_on_beside_full_attention_only(kind: str, reason: str | None) -> None:
    both = several(offloading(9), lmcache(9))
    connector = Engine(num_blocks=50, kv_transfer=both).scheduler.connector
    assert asked_of(connector, kind) == reason
