# SPDX-License-Identifier: Apache-2.0
"""The patch mechanism on toy classes: what it refuses, what it changes, what it puts back."""

import asyncio
import functools
import importlib
import inspect
import logging
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vllm_stateful.compat import patch as patch_module
from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import CompatError, DriftError, Patch, apply_all, call_shape

TOYS = """
import functools

class Base:
    def inherited(self): return "base"

class Toy(Base):
    limit = 3
    def plain(self, a, b=2):
        "Adds."
        return a + b
    @staticmethod
    def static(a): return a
    @classmethod
    def of_class(cls, a): return (cls.__name__, a)
    async def waits(self, a): return a
    @property
    def reads(self): return 1
    class Inner:
        def deep(self): return "deep"

class Child(Toy): pass

def function(a, *, b=1): return a + b
"""
LOG = logging.getLogger("toys")


@pytest.fixture
def toys() -> Iterator[Any]:
    module = types.ModuleType("toys_for_patch")
    exec(TOYS, module.__dict__)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def tagging(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ("wrapped", original(*args, **kwargs))

    return replacement


def tagging_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def replacement(*args: Any, **kwargs: Any) -> Any:
        return ("wrapped", await original(*args, **kwargs))

    return replacement


def make(member: str, signature: str, wrap: Any = tagging, **changes: Any) -> Patch:
    fields: dict[str, Any] = {
        "name": f"toy-{member}",
        "target": f"toys_for_patch:{member}",
        "wrap": wrap,
        "symptom": "s",
        "reason": "r",
        "feature": "toys",
        "process": "all",
        "signature": signature,
        "upstream": "u",
        "remove_when": "w",
    }
    return Patch(**(fields | changes))


CASES = [
    ("Toy.plain", "(self, a, b=...)", lambda m: m.Toy().plain(1), 3),
    ("Toy.static", "(a)", lambda m: m.Toy.static(1), 1),
    ("Toy.static", "(a)", lambda m: m.Toy().static(1), 1),
    ("Toy.of_class", "(cls, a)", lambda m: m.Child.of_class(1), ("Child", 1)),
    ("Toy.Inner.deep", "(self)", lambda m: m.Toy.Inner().deep(), "deep"),
    ("function", "(a, *, b=...)", lambda m: m.function(1, b=5), 6),
]


@pytest.mark.parametrize(("member", "signature", "call", "stock"), CASES)
def test_wraps_every_kind_of_function_and_undo_restores_the_object(
    toys: Any, member: str, signature: str, call: Callable[[Any], Any], stock: Any
) -> None:
    *path, name = member.split(".")
    owner = functools.reduce(getattr, path, toys)
    original = vars(owner)[name]
    patch = make(member, signature)
    patch.apply()
    assert call(toys) == ("wrapped", stock)
    assert type(vars(owner)[name]) is type(original)
    patch.undo()
    assert vars(owner)[name] is original
    assert call(toys) == stock


def test_coroutine_function_stays_one(toys: Any) -> None:
    make("Toy.waits", "async (self, a)", tagging_async).apply()
    assert inspect.iscoroutinefunction(toys.Toy.waits)
    assert asyncio.run(toys.Toy().waits(4)) == ("wrapped", 4)


def test_plain_replacement_of_a_coroutine_function_is_refused(toys: Any) -> None:
    with pytest.raises(CompatError, match="mixes async and plain"):
        make("Toy.waits", "async (self, a)", tagging).apply()


@pytest.mark.parametrize("wrap", [lambda original: original, lambda original: 3])
def test_replacement_must_be_a_new_function(toys: Any, wrap: Any) -> None:
    with pytest.raises(CompatError, match="must return a new function"):
        make("function", "(a, *, b=...)", wrap).apply()


def test_replacement_keeps_name_docstring_and_signature(toys: Any) -> None:
    make("Toy.plain", "(self, a, b=...)").apply()
    assert toys.Toy.plain.__name__ == "plain"
    assert toys.Toy.plain.__doc__ == "Adds."
    assert call_shape(toys.Toy.plain) == "(self, a, b=...)"


def test_second_apply_is_a_no_op_also_from_another_object_and_a_re_import(toys: Any) -> None:
    first = make("function", "(a, *, b=...)")
    first.apply()
    replacement = toys.function
    first.apply()
    make("function", "(a, *, b=...)", lambda original: lambda a, *, b=1: None).apply()
    spec = importlib.util.spec_from_file_location("patch_again", patch_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    sys.modules["patch_again"] = again
    try:
        spec.loader.exec_module(again)
        reimported = again.Patch(**vars(first))
        assert reimported.is_applied
        reimported.apply()
        assert toys.function is replacement
        reimported.undo()
    finally:
        del sys.modules["patch_again"]
    assert not first.is_applied
    assert toys.function(1) == 2


def test_two_patches_of_one_target_undo_in_reverse_order(toys: Any) -> None:
    original = toys.function
    inner, outer = (make("function", "(a, *, b=...)", name=name) for name in ("inner", "outer"))
    inner.apply()
    outer.apply()
    assert toys.function(1) == ("wrapped", ("wrapped", 2))
    assert inner.is_applied
    assert outer.is_applied
    with pytest.raises(CompatError, match="wrapped again"):
        inner.undo()
    outer.undo()
    inner.undo()
    assert toys.function is original


def test_a_foreign_wrapper_on_top_is_seen_and_not_torn_off(toys: Any) -> None:
    patch = make("function", "(a, *, b=...)")
    patch.apply()
    ours = toys.function

    @functools.wraps(ours)
    def foreign(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    toys.function = foreign
    patch.apply()
    assert toys.function is foreign
    with pytest.raises(CompatError, match="wrapped again"):
        patch.undo()


@pytest.mark.parametrize(
    ("member", "signature", "difference"),
    [
        ("Toy.plain", "(self, a, b)", r"its signature is \(self, a, b=\.\.\.\), expected"),
        ("Toy.plain", "(self, a, *, b=...)", "its signature is"),
        ("Toy.plain", "(self, a, c=...)", "its signature is"),
        ("Toy.waits", "(self, a)", r"its signature is async \(self, a\)"),
        ("Toy.gone", "(self)", "gone does not exist"),
        ("Gone.plain", "(self)", "Gone does not exist"),
        ("Toy.inherited", "(self)", "inherited is inherited, patch it where it is defined"),
        ("Child.plain", "(self, a, b=...)", "plain is inherited"),
        ("Toy.reads", "(self)", "it is a property, not a function"),
        ("Toy.limit", "(self)", "it is a int, not a function"),
    ],
)
def test_drift_names_patch_target_and_difference(
    toys: Any, member: str, signature: str, difference: str
) -> None:
    patch = make(member, signature)
    for attempt in (patch.check, patch.apply):
        with pytest.raises(DriftError, match=difference) as caught:
            attempt()
        assert patch.name in str(caught.value)
        assert patch.target in str(caught.value)
    assert not patch.is_applied


def test_missing_module_is_drift_and_its_status_imports_nothing() -> None:
    patch = make("function", "(a)", target="toys_nowhere.at_all:function")
    assert not patch.is_applied
    with pytest.raises(DriftError, match=r"module toys_nowhere.at_all cannot be imported"):
        patch.apply()
    patch.undo()


def test_drift_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(DriftError("p", "t", "d")))
    assert str(error) == "patch 'p' does not fit t: d"


def test_check_changes_nothing(toys: Any) -> None:
    original = toys.function
    make("function", "(a, *, b=...)").check()
    assert toys.function is original


def add_member(_: None) -> Callable[..., Any]:
    def added(self: Any, a: int) -> int:
        return a + 1

    return added


def test_adds_a_member_and_undo_removes_it(toys: Any) -> None:
    patch = make("Toy.added", "(self, a)", add_member, adds=True)
    patch.apply()
    patch.apply()
    assert toys.Child().added(1) == 2
    patch.undo()
    assert not hasattr(toys.Toy, "added")


@pytest.mark.parametrize("member", ["Toy.plain", "Toy.inherited"])
def test_adds_refuses_a_member_that_exists(toys: Any, member: str) -> None:
    with pytest.raises(DriftError, match="exists already"):
        make(member, "(self, a)", add_member, adds=True).apply()


def test_adds_must_add_what_it_says(toys: Any) -> None:
    with pytest.raises(CompatError, match="not what it says"):
        make("Toy.added", "(self)", add_member, adds=True).apply()


def test_call_shape_ignores_annotations_and_default_values() -> None:
    async def one(a: "list[int]", /, b: int = 3, *c: str, d: str = "x", **e: Any) -> None: ...
    async def two(a, /, b=None, *c, d=(), **e): ...  # type: ignore[no-untyped-def]

    assert call_shape(one) == call_shape(two) == "async (a, /, b=..., *c, d=..., **e)"


def features() -> tuple[Patch, ...]:
    return (
        make("function", "(a, *, b=...)", feature="one"),
        make("Toy.plain", "(self, a, b=...)", feature="two"),
        make("Toy.static", "(a)", feature="one"),
        make("Toy.of_class", "(cls, wrong)", feature="one"),
    )


def test_a_feature_is_applied_all_or_none(toys: Any, caplog: pytest.LogCaptureFixture) -> None:
    originals = dict(vars(toys.Toy)), toys.function
    patches = features()
    assert apply_all(patches, strict=False, log=LOG) == [patches[1]]
    assert toys.function is originals[1]
    assert vars(toys.Toy)["static"] is originals[0]["static"]
    assert patches[1].is_applied
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "'one' is off" in record.message
    assert "Toy.of_class" in record.message
    assert "\n" not in record.message


def test_apply_all_twice_changes_nothing(toys: Any) -> None:
    patches = features()[:3]
    assert apply_all(patches, strict=True, log=LOG) == [patches[0], patches[2], patches[1]]
    replaced = toys.function
    assert len(apply_all(patches, strict=True, log=LOG)) == 3
    assert toys.function is replaced


def test_strict_raises_and_leaves_no_new_patch_behind(toys: Any) -> None:
    before, first, bad = (
        make("Toy.plain", "(self, a, b=...)", feature="before"),
        make("function", "(a, *, b=...)", feature="first"),
        make("Toy.static", "(b)", feature="bad"),
    )
    before.apply()
    with pytest.raises(DriftError):
        apply_all((before, first, bad), strict=True, log=LOG)
    assert [patch.is_applied for patch in (before, first, bad)] == [True, False, False]


def test_a_hook_imports_its_function_when_it_is_called() -> None:
    hook = Hook("json:loads")
    assert hook("[1]") == [1]
    hook.set(len)
    assert hook("[1]") == 3
    hook.clear()
    assert hook("[1]") == [1]
    assert "json:loads" in repr(hook)


@pytest.mark.parametrize(
    ("target", "error"), [("json:nothing", AttributeError), ("no.such.module:x", ImportError)]
)
def test_a_hook_without_a_function_says_so(target: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Hook(target)()
