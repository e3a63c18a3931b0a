# SPDX-License-Identifier: Apache-2.0
"""Wraps one member of vLLM: it is checked first, applied once, and undone exactly.

A patch never guesses. If the target is gone, or has another shape than the one that the patch was
written for, it raises `DriftError` and changes nothing. The form follows vllm-metal's dated shims
and ArcticInference's patch class, and adds the checks that those lack.
"""

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal, NamedTuple

from vllm_stateful.compat.hook import Hook
from vllm_stateful.errors import StatefulError

Process = Literal["api", "engine", "worker", "all"]

# The replacement carries this attribute, by which a re-imported patch recognises it.
_MARK = "__vllm_stateful_patch__"


class CompatError(StatefulError):
    """A patch cannot be applied to, or removed from, the installed vLLM."""


class DriftError(CompatError):
    """The target of a patch is not what the patch was written for."""

    def __init__(self, patch: str, target: str, difference: str) -> None:
        super().__init__(patch, target, difference)
        self.patch, self.target, self.difference = patch, target, difference

    def __str__(self) -> str:
        return f"patch {self.patch!r} does not fit {self.target}: {self.difference}"


class UseDriftError(CompatError):
    """Something that the adapters use of vLLM is not as it was when they were written (`uses`)."""


class _Mark(NamedTuple):
    """What `undo` needs. It may come from an older import of this file, so use attributes only."""

    name: str
    original: Any
    replacement: Any
    added: bool


class _AnyDefault:
    def __repr__(self) -> str:
        return "..."


_UNRESOLVED: dict[str, Any] = {}
if sys.version_info >= (3, 14):  # annotations may use names that only type checkers import
    _UNRESOLVED["annotation_format"] = importlib.import_module("annotationlib").Format.FORWARDREF


def call_shape(function: Callable[..., Any]) -> str:
    """The signature as text that is the same on every Python version.

    It has no annotations, and defaults are written as ``...``. It begins with ``async`` for a
    coroutine function. Example: ``(self, prompt, *, n=...)``.
    """
    signature = inspect.signature(function, **_UNRESOLVED)
    parameters = [_bare(parameter) for parameter in signature.parameters.values()]
    bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return f"{_async_prefix(function)}{bare}"


def _bare(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if default is not inspect.Parameter.empty:
        default = _AnyDefault()
    return parameter.replace(annotation=inspect.Parameter.empty, default=default)


def _async_prefix(function: Callable[..., Any]) -> str:
    if inspect.isasyncgenfunction(function):
        return "async generator "
    return "async " if inspect.iscoroutinefunction(function) else ""


@dataclass(frozen=True)
class Patch:
    """One wrapped member of vLLM (or one new member, with ``adds``), and the reason for it.

    Attributes:
        name: A unique name. It also identifies the patch after a re-import.
        target: ``package.module:Class.attr`` or ``package.module:function``.
        wrap: Gets the original function and ``calls``, and returns the replacement. With
            ``adds`` it gets None and ``calls``.
        symptom: What a user of stock vLLM sees.
        reason: Why this member is wrapped, and why no official seam is enough.
        feature: The feature that needs the patch. All patches of a feature are applied, or none.
        process: The process in which the target runs.
        signature: `call_shape` of the original (with ``adds``: of the new member).
        upstream: Path under ``patches/`` of the change to vLLM that makes this patch unnecessary.
        remove_when: The event after which this patch is removed.
        calls: Our functions that the replacement calls.
        adds: Whether the member is new. It must not exist yet then.
    """

    name: str
    target: str
    wrap: Callable[..., Any]
    symptom: str
    reason: str
    feature: str
    process: Process
    signature: str
    upstream: str
    remove_when: str
    calls: tuple[Hook, ...] = ()
    adds: bool = False

    @property
    def is_applied(self) -> bool:
        """Whether this patch is applied, perhaps below another wrapper."""
        module, *path = self._path()
        owner: Any = sys.modules.get(module)
        for name in path[:-1]:
            owner = getattr(owner, name, None)
        return any(mark.name == self.name for mark in _marks(_own(owner, path[-1])))

    def check(self) -> None:
        """Check that the patch fits, without changing anything.

        Raises:
            DriftError: the target is missing, is inherited, is not a function, or has another
                shape.
        """
        if not self.is_applied:
            self._prepare()

    def apply(self) -> None:
        """Put the replacement in place. A no-op if the patch is applied already.

        Raises:
            DriftError: as for `check`.
            CompatError: ``wrap`` returned something that cannot replace the original.
        """
        if self.is_applied:
            return
        owner, attribute, original, replacement = self._prepare()
        mark = _Mark(self.name, original, replacement, self.adds)
        setattr(replacement, _MARK, mark)
        setattr(owner, attribute, _like(original, replacement))

    def undo(self) -> None:
        """Put back the object that `apply` found. A no-op if the patch is not applied.

        Raises:
            CompatError: the target was wrapped again. That wrapper must be removed first.
        """
        if not self.is_applied:
            return
        owner, attribute = self._site()
        function = _function(_own(owner, attribute))
        mark = vars(function).get(_MARK)
        if mark is None or mark.replacement is not function or mark.name != self.name:
            raise CompatError(f"cannot undo {self.name!r}: {self.target} was wrapped again")
        if mark.added:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, mark.original)

    def _path(self) -> list[str]:
        module, _, path = self.target.partition(":")
        return [module, *path.split(".")]

    def _drift(self, difference: str) -> DriftError:
        return DriftError(self.name, self.target, difference)

    def _site(self) -> tuple[Any, str]:
        """The class or module that has the member, and the member's name."""
        module, *path = self._path()
        try:
            owner: Any = importlib.import_module(module)
        except ImportError as error:
            raise self._drift(f"module {module} cannot be imported ({error})") from error
        for name in path[:-1]:
            if not hasattr(owner, name):
                raise self._drift(f"{name} does not exist")
            owner = getattr(owner, name)
        return owner, path[-1]

    def _prepare(self) -> tuple[Any, str, Any, Any]:
        """The owner, the attribute, the original as stored (None if added), and the replacement."""
        owner, attribute = self._site()
        if self.adds:
            return owner, attribute, None, self._new_member(owner, attribute)
        original = self._checked_original(owner, attribute)
        return owner, attribute, original, self._replacement(_function(original))

    def _new_member(self, owner: Any, attribute: str) -> Any:
        if hasattr(owner, attribute):
            raise self._drift(f"{attribute} exists already, it was to be added")
        member = self.wrap(None, *self.calls)
        if call_shape(member) != self.signature:
            raise CompatError(f"patch {self.name!r} adds {call_shape(member)}, not what it says")
        return member

    def _checked_original(self, owner: Any, attribute: str) -> Any:
        if attribute not in vars(owner):
            inherited = hasattr(owner, attribute)
            found = "is inherited, patch it where it is defined" if inherited else "does not exist"
            raise self._drift(f"{attribute} {found}")
        original = vars(owner)[attribute]
        function = _function(original)
        if not isinstance(function, FunctionType):
            raise self._drift(f"it is a {type(function).__name__}, not a function")
        if (found := call_shape(function)) != self.signature:
            raise self._drift(f"its signature is {found}, expected {self.signature}")
        return original

    def _replacement(self, function: Any) -> Any:
        replacement = self.wrap(function, *self.calls)
        if replacement is function or not isinstance(replacement, FunctionType):
            raise CompatError(f"patch {self.name!r} must return a new function")
        if _async_prefix(replacement) != _async_prefix(function):
            raise CompatError(f"patch {self.name!r} mixes async and plain functions")
        return functools.update_wrapper(replacement, function)


def _own(owner: Any, attribute: str) -> Any:
    """The member as stored in ``owner`` itself, neither inherited nor bound; None if not there."""
    return None if owner is None else vars(owner).get(attribute)


def _function(member: Any) -> Any:
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def _like(original: Any, replacement: Any) -> Any:
    if isinstance(original, staticmethod | classmethod):
        return type(original)(replacement)
    return replacement


def _marks(member: Any) -> Iterator[Any]:
    """Yield our marks down a chain of wrappers, without copies that functools.wraps made."""
    function = _function(member)
    while isinstance(function, FunctionType):
        mark = vars(function).get(_MARK)
        if mark is not None and mark.replacement is function:
            yield mark
        function = vars(function).get("__wrapped__")


def apply_all(
    patches: Iterable[Patch],
    *,
    strict: bool,
    log: logging.Logger,
    check: Callable[[str], None] = lambda feature: None,
) -> list[Patch]:
    """Apply patches feature by feature, and return those that are applied.

    Of each feature all patches are applied, or none. A feature that does not fit is left off, with
    one warning line. With ``strict``, everything that this call applied is undone and the error is
    raised.

    Args:
        patches: the patches, in the order in which they are applied.
        strict: whether a feature that does not fit is an error.
        log: gets the warnings.
        check: raises a `CompatError` when something else that a feature needs does not fit.

    Raises:
        CompatError: only with ``strict``; mostly a `DriftError`.
    """
    applied: list[Patch] = []
    fresh: list[Patch] = []
    off: dict[str, list[str]] = {}
    for feature, group in _by_feature(patches).items():
        new = [patch for patch in group if not patch.is_applied]
        try:
            check(feature)
            _apply_group(group)
        except CompatError as error:
            _undo_group(new)
            if strict:
                _undo_group(fresh)
                raise
            off.setdefault(str(error), []).append(feature)
        else:
            applied += group
            fresh += new
    for error_text, features in off.items():
        log.warning("stateful: %s", off_line(features, error_text))
    return applied


def off_line(features: list[str], why: str) -> str:
    """The line of the log about features that do not fit."""
    names = ", ".join(map(repr, features))
    said = f"features {names} are" if len(features) > 1 else f"feature {names} is"
    return f"{said} off: {why}"


def _by_feature(patches: Iterable[Patch]) -> dict[str, list[Patch]]:
    groups: dict[str, list[Patch]] = {}
    for patch in patches:
        groups.setdefault(patch.feature, []).append(patch)
    return groups


def _apply_group(group: list[Patch]) -> None:
    try:
        for patch in group:
            patch.apply()
    except Exception:
        _undo_group(group)
        raise


def _undo_group(group: list[Patch]) -> None:
    for patch in reversed(group):
        patch.undo()
