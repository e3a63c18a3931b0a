# SPDX-License-Identifier: Apache-2.0
"""One class or module of vLLM, and what adapters use of it. The ledgers are lists of these."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_stateful.compat.patch import Process


@dataclass(frozen=True)
class Use:
    """What is used of one class or module.

    Attributes:
        owner: ``package.module`` or ``package.module:Class``.
        feature: what is off when it has drifted; also a feature of patches, where it has some.
        process: where it is used.
        names: members that are called or read; of a module its functions and constants.
        overrides: methods that a class of ours has in their place.
        asked_by: who in vLLM calls the overridden ones: classes or modules, with spaces between. A
            method that nobody there asks for any longer has drifted. Special methods are called
            without their name: of these only the signature is checked.
    """

    owner: str
    feature: str
    process: Process
    names: str = ""
    overrides: str = ""
    asked_by: str = ""

    @property
    def members(self) -> tuple[str, ...]:
        """All names, each once."""
        return tuple(dict.fromkeys(f"{self.names} {self.overrides}".split()))
