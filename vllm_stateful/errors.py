# SPDX-License-Identifier: Apache-2.0
"""The exceptions of the package, with one base class."""


class StatefulError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigError(StatefulError, ValueError):
    """An option has a value that is not allowed.

    The message names the key, the value and what is allowed.
    """


class UnsupportedError(StatefulError):
    """This vLLM, model or engine setting is not known to be safe for stateful sessions."""


class InvariantError(StatefulError, AssertionError):
    """The block pool and the residencies disagree: a bug in this package."""
