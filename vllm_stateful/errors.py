# SPDX-License-Identifier: Apache-2.0
"""The exceptions of the package: one small tree."""


class StatefulError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(StatefulError, ValueError):
    """An option has a value that is not allowed. Names the key, the value and what is allowed."""


class UnsupportedError(StatefulError):
    """This vLLM, model or engine setting is not known to be safe for stateful sessions."""


class InvariantError(StatefulError, AssertionError):
    """The block pool and the residencies disagree: a bug in this package."""
