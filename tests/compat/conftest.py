# SPDX-License-Identifier: Apache-2.0
"""Patches of the ledger are undone, and their hooks emptied, around a test that asks for it."""

from collections.abc import Iterator

import pytest

from vllm_stateful.compat.ledger import PATCHES


@pytest.fixture
def stock_vllm() -> Iterator[None]:
    """The test starts and ends on stock vLLM, also when other tests left patches behind."""
    before = [patch for patch in PATCHES if patch.is_applied]
    hooks = [hook for patch in PATCHES for hook in patch.calls]
    for patch in reversed(before):
        patch.undo()
    for hook in hooks:
        hook.clear()
    yield
    for patch in reversed(PATCHES):
        patch.undo()
    for patch in before:
        patch.apply()
    for hook in hooks:
        hook.clear()
