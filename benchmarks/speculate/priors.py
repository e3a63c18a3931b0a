# SPDX-License-Identifier: Apache-2.0
"""Makes drafting start from other chances than the shipped ones, in this process."""

from __future__ import annotations

from vllm_stateful.speculate import drafts
from vllm_stateful.speculate.drafts import Floats


def use(chances: Floats) -> None:
    """Agents that are met from now on start from these.

    Args:
        chances: of each class, in the shape of ``PRIORS``.

    Raises:
        ValueError: they are no chances, or have another shape.
    """
    if chances.shape != drafts.PRIORS.shape:
        raise ValueError(f"priors have the shape {drafts.PRIORS.shape}, not {chances.shape}")
    if not ((chances >= 0) & (chances <= 1)).all():
        raise ValueError("priors are chances, from 0 to 1")
    drafts.PRIORS = chances
