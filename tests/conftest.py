# SPDX-License-Identifier: Apache-2.0
"""Lets all tests import what they share, and gives each the options of its own environment."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_stateful.config import process_config

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _options_are_read_anew() -> Iterator[None]:
    """A process reads its options once, but each test may change the environment."""
    process_config.cache_clear()
    yield
    process_config.cache_clear()
