# SPDX-License-Identifier: Apache-2.0
"""Reads the shapes of members of vLLM, from the imported modules or from source files.

A shape is a text: for a function its signature and the annotation of its result, ``attribute`` for
data and properties, ``class`` for a class. Both readers give the same text for the same code, so a
vLLM that is not installed can be compared with one that was.
"""

from __future__ import annotations

import ast
import dis
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Protocol

from vllm_stateful.compat.patch import call_shape

ATTRIBUTE = "attribute"
CLASS = "class"


class Reader(Protocol):
    """Reads one vLLM. ``owner`` is ``package.module`` or ``package.module:Class``."""

    def shape(self, owner: str, name: str) -> str | None:
        """The shape of a member; None if the member does not exist."""
        ...

    def mentions(self, owner: str, name: str) -> bool:
        """Whether the code of a class or module uses an attribute of that name."""
        ...


def _plain(annotation: str) -> str:
    """An annotation without module names, quotes and spaces."""
    bare = re.sub(r"(?:\w+\.)+(\w+)", r"\1", annotation)
    return re.sub(r"[\s'\"~]", "", bare)


# ---- the imported vLLM -------------------------------------------------------------------------


class Live:
    """Reads the vLLM that is installed, by importing it."""

    def shape(self, owner: str, name: str) -> str | None:
        """See `Reader`. Imports the module."""
        found = _owner(owner)
        if found is None:
            return None
        if not isinstance(found, type):
            return _live_shape(vars(found)[name]) if name in vars(found) else None
        member = inspect.getattr_static(found, name, None)
        if member is not None:
            return _live_shape(member)
        return ATTRIBUTE if name in _instance_names(found) else None

    def mentions(self, owner: str, name: str) -> bool:
        """See `Reader`."""
        found = _owner(owner)
        return found is not None and any(name in code.co_names for code in _codes(found))


def _owner(owner: str) -> Any:
    module, _, path = owner.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found


def _live_shape(member: Any) -> str:
    if isinstance(member, type):
        return CLASS
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    if not isinstance(member, FunctionType):
        return ATTRIBUTE
    returns = _annotations(inspect.unwrap(member)).get("return", inspect.Signature.empty)
    if returns is inspect.Signature.empty:
        return call_shape(member)
    text = returns if isinstance(returns, str) else inspect.formatannotation(returns)
    return f"{call_shape(member)} -> {_plain(text)}"


def _annotations(found: Any) -> Mapping[str, Any]:
    """The annotations of a function, or those of a class without inherited ones.

    From Python 3.14 on, annotations are evaluated when they are read. They may contain a name that
    only type checkers import.
    """
    if sys.version_info < (3, 14):
        own: Mapping[str, Any] = vars(found).get("__annotations__", {})
        return own if isinstance(found, type) else found.__annotations__
    library = importlib.import_module("annotationlib")
    try:
        made: Mapping[str, Any] = library.get_annotations(found)
    except NameError:
        made = library.get_annotations(found, format=library.Format.STRING)
    return made


def _functions(found: type) -> Iterator[FunctionType]:
    for member in vars(found).values():
        inner = getattr(member, "fget", None) or getattr(member, "func", member)
        inner = inspect.unwrap(getattr(inner, "__func__", inner))
        if isinstance(inner, FunctionType):
            yield inner


@functools.cache
def _instance_names(found: type) -> frozenset[str]:
    """The names that a class annotates, and those that its methods assign as attributes."""
    names: set[str] = set()
    for each in found.__mro__[:-1]:
        names.update(_annotations(each))
        names.update(getattr(each, "__struct_fields__", ()))
        for function in _functions(each):
            steps = dis.get_instructions(function)
            names.update(step.argval for step in steps if step.opname == "STORE_ATTR")
    return frozenset(names)


def _codes(found: Any) -> Iterator[CodeType]:
    members = vars(found).values()
    functions = list(_functions(found)) if isinstance(found, type) else []
    if not isinstance(found, type):
        for member in members:
            if getattr(member, "__module__", None) != found.__name__:
                continue
            if isinstance(member, type):
                functions += _functions(member)
            elif isinstance(inspect.unwrap(member) if callable(member) else None, FunctionType):
                functions.append(inspect.unwrap(member))
    waiting = [function.__code__ for function in functions]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [each for each in code.co_consts if isinstance(each, CodeType)]


# ---- source files ------------------------------------------------------------------------------


class Source:
    """Reads a vLLM that is not imported, from the folder that contains the package ``vllm``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, ast.Module | None] = {}

    def shape(self, owner: str, name: str) -> str | None:
        """See `Reader`."""
        module, _, path = owner.partition(":")
        if not path:
            found = self._in_module(module, name)
            return None if found is None else self._shape_of(*found)
        defined = self._class(module, path)
        return None if defined is None else self._in_class(*defined, name)

    def mentions(self, owner: str, name: str) -> bool:
        """See `Reader`."""
        module, _, path = owner.partition(":")
        found = self._class(module, path) if path else (module, self._tree(module))
        if found is None or found[1] is None:
            return False
        return any(isinstance(n, ast.Attribute) and n.attr == name for n in ast.walk(found[1]))

    def exists(self, owner: str) -> bool:
        """Whether a class or module exists."""
        module, _, path = owner.partition(":")
        return (self._class(module, path) if path else self._tree(module)) is not None

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._modules:
            path = self._root.joinpath(*module.split("."))
            files = (path.with_suffix(".py"), path / "__init__.py")
            text = next((file.read_text() for file in files if file.is_file()), None)
            self._modules[module] = None if text is None else ast.parse(text)
        return self._modules[module]

    def _in_module(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module and the statement that define a name. Imports are followed inside vLLM."""
        tree = self._tree(module)
        for node in _statements(tree.body if tree is not None else []):
            if name in _bound(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return self._imported(module, node, alias.name)
        return None

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> tuple[str, ast.AST] | None:
        source = node.module or ""
        if node.level:
            package = module.split(".")
            is_package = (self._root.joinpath(*package) / "__init__.py").is_file()
            package = package[: len(package) - node.level + is_package]
            source = ".".join([*package, *filter(None, [source])])
        if not source.startswith("vllm"):
            return module, node
        if self._tree(f"{source}.{name}") is not None and self._in_module(source, name) is None:
            return source, node  # the name is a module of the package
        return self._in_module(source, name)

    def _class(self, module: str, path: str) -> tuple[str, ast.ClassDef] | None:
        found = self._in_module(module, path)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        return found[0], found[1]

    def _in_class(self, module: str, defined: ast.ClassDef, name: str) -> str | None:
        for node in _statements(defined.body):
            if name in _bound(node):
                return self._shape_of(module, node)
        for each in ast.walk(defined):
            stored = isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            if stored and each.attr == name:  # type: ignore[attr-defined]
                return ATTRIBUTE
        for base in defined.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self._class(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None and (shape := self._in_class(*found, name)) is not None:
                return shape
        return None

    def _shape_of(self, module: str, node: ast.AST) -> str:
        if isinstance(node, ast.ClassDef):
            return CLASS
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return ATTRIBUTE
        if any(ast.unparse(each).endswith("property") for each in node.decorator_list):
            return ATTRIBUTE
        shape = f"{_source_colour(node)}({', '.join(_parameters(node.args))})"
        returns = self._without_alias(module, node.returns)
        return shape if returns is None else f"{shape} -> {_plain(ast.unparse(returns))}"

    def _without_alias(self, module: str, returns: ast.expr | None) -> ast.expr | None:
        """A return annotation, with an alias replaced by its value."""
        found = self._in_module(module, returns.id) if isinstance(returns, ast.Name) else None
        named = found[1] if found is not None else None
        value = named.value if isinstance(named, ast.Assign | ast.AnnAssign) else None
        is_alias = isinstance(value, ast.Subscript | ast.BinOp)
        return value if is_alias else returns


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a block and of its branches."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _bound(node: ast.AST) -> set[str]:
    """The names that a statement defines. An overload defines none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        overloaded = any(ast.unparse(each).endswith("overload") for each in node.decorator_list)
        return set() if overloaded else {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    parts = (each for target in targets for each in ast.walk(target))
    return {each.id for each in parts if isinstance(each, ast.Name)}


def _source_colour(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        return ""
    return "async generator " if any(_yields(node)) else "async "


def _yields(node: ast.AST) -> Iterator[bool]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Yield | ast.YieldFrom):
            yield True
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _yields(child)


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    """Yield the parameters as ``inspect.Signature`` writes them, with defaults as ``...``.

    Annotations are left out.
    """
    named = [*arguments.posonlyargs, *arguments.args]
    first_default = len(named) - len(arguments.defaults)
    for place, each in enumerate(named):
        yield each.arg + ("=..." if place >= first_default else "")
        if place + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg is not None:
        yield f"*{arguments.vararg.arg}"
    elif arguments.kwonlyargs:
        yield "*"
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield each.arg + ("=..." if default is not None else "")
    if arguments.kwarg is not None:
        yield f"**{arguments.kwarg.arg}"
