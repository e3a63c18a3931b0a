# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of KV in files: is it found again after a restart?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_stateful.adapters.doctor.files import SEED_ENV, file_findings


def connector(*kinds: str) -> Any:
    extra = {"secondary_tiers": [{"type": kind} for kind in kinds]}
    config = SimpleNamespace(get_from_extra_config=extra.get)
    return SimpleNamespace(_kv_transfer_config=config)


@pytest.mark.parametrize(
    ("kinds", "algorithm", "seed", "mark", "text"),
    [
        (["SessionFiles"], "sha256", None, "ok", "kept over a restart, for these weights"),
        (["fs"], "sha256_cbor", None, "warn", "new weights under the same name"),
        (["SessionFiles"], "xxhash", None, "warn", "lost at a restart: xxhash draws new hashes"),
        (["SessionFiles"], "xxhash_cbor", "0", "ok", "kept over a restart"),
        (["p2p", "fs"], "xxhash", None, "warn", "lost at a restart"),
    ],
)
def test_files(
    kinds: list[str],
    algorithm: str,
    seed: str | None,
    mark: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(SEED_ENV, raising=False)
    if seed is not None:
        monkeypatch.setenv(SEED_ENV, seed)
    (found,) = file_findings(connector(*kinds), algorithm)
    assert (found.section, found.mark) == ("files", mark)
    assert text in found.text


def test_without_files_nothing_is_said() -> None:
    assert not list(file_findings(connector(), "xxhash"))
    assert not list(file_findings(connector("p2p"), "xxhash"))
