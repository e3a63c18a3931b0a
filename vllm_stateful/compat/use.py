# SPDX-License-Identifier: Apache-2.0
"""Describes what the adapters use of one class or module of vLLM. ``used_by_*`` list all."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_stateful.compat.patch import Process


@dataclass(frozen=True)
class Use:
    """What is used of one class or module of vLLM.

    Attributes:
        owner: ``package.module`` or ``package.module:Class``.
        feature: the feature that is off when one of the members has drifted. It may have patches,
            too.
        process: the process that uses it.
        names: members that are called or read, separated by spaces. Of a module these are functions
            and constants.
        overrides: methods that a class of ours overrides, separated by spaces.
        asked_by: classes or modules of vLLM that call the overridden methods, separated by spaces.
            A method that none of them calls any longer has drifted. Special methods are called
            without their name, so only their signature is checked.
    """

    owner: str
    feature: str
    process: Process
    names: str = ""
    overrides: str = ""
    asked_by: str = ""

    @property
    def members(self) -> tuple[str, ...]:
        """All names and overrides, each once."""
        return tuple(dict.fromkeys(f"{self.names} {self.overrides}".split()))
