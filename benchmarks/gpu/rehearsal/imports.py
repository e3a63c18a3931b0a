# SPDX-License-Identifier: Apache-2.0
"""Every import statement of what a run loads, inside of functions too: does it find its module?

Statements under `if TYPE_CHECKING` and those whose failure is caught are left out.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ALLOWED = Path(__file__).with_name("allowed.txt")
OURS = ("vllm", "vllm_stateful", "benchmarks")
NAMES_CHECKED = ("torch", "triton", "transformers", "fastapi", "starlette", "pydantic", "openai")
"""Of these packages the names after `from MODULE import` are looked up too."""
CAUGHT = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException", "AttributeError"}


@dataclass(frozen=True)
class Statement:
    """One imported name of one statement.

    Attributes:
        module: What is imported, or imported from; absolute.
        name: Behind `from module import`; empty for `import module`.
        is_lazy: It stands in a function.
    """

    module: str
    name: str
    where: str
    line: int
    is_lazy: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def statements(source: str, module: str, is_package: bool) -> Iterator[Statement]:
    """What a module imports, whenever it does."""
    yield from _walk(ast.parse(source).body, module, is_package, is_lazy=False)


def _walk(
    body: Iterable[ast.AST], module: str, is_package: bool, is_lazy: bool
) -> Iterator[Statement]:
    for node in body:
        if isinstance(node, ast.Import):
            for each in node.names:
                yield Statement(each.name, "", module, node.lineno, is_lazy)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, module, is_package)
            for each in node.names:
                yield Statement(source, each.name, module, node.lineno, is_lazy)
        elif isinstance(node, ast.Try) and any(map(_catches_imports, node.handlers)):
            rest = [part for each in node.handlers for part in each.body]
            yield from _walk([*rest, *node.orelse, *node.finalbody], module, is_package, is_lazy)
        elif isinstance(node, ast.With) and any(map(_suppresses_imports, node.items)):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(node.orelse, module, is_package, is_lazy)
        else:
            inside = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _walk(ast.iter_child_nodes(node), module, is_package, inside)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")
    kept = parents[: len(parents) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _suppresses_imports(item: ast.withitem) -> bool:
    called = item.context_expr
    return (
        isinstance(called, ast.Call)
        and ast.unparse(called.func).endswith("suppress")
        and any(ast.unparse(each) in CAUGHT for each in called.args)
    )


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return bool(CAUGHT & {ast.unparse(kind).rpartition(".")[2] for kind in kinds})


@dataclass(frozen=True)
class Source:
    """A module's file."""

    path: Path
    is_package: bool


@cache
def source_of(module: str) -> Source | None:
    """Where a module is written, without importing anything; none: it is no Python file."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        place = Path(folder, *rest)
        if (place / "__init__.py").is_file():
            return Source(place / "__init__.py", True)
        if rest and place.with_suffix(".py").is_file():
            return Source(place.with_suffix(".py"), False)
    return None


@cache
def statements_of(module: str) -> tuple[Statement, ...]:
    """All of a module's; nothing where it is no Python file."""
    source = source_of(module)
    if source is None:
        return ()
    return tuple(statements(source.path.read_text(), module, source.is_package))


def closure(roots: Iterable[str]) -> set[str]:
    """The modules of ours and of vLLM that importing these loads, read from the sources alone."""
    found: set[str] = set()
    open_ones = list(roots)
    while open_ones:
        module = open_ones.pop()
        if module in found or module.partition(".")[0] not in OURS or source_of(module) is None:
            continue
        found.add(module)
        open_ones.append(module.rpartition(".")[0])
        for each in statements_of(module):
            if not each.is_lazy:
                open_ones += [each.module, *([f"{each.module}.{each.name}"] if each.name else [])]
    return found


def allowed() -> dict[str, str]:
    """What may be missing, and why: NAME REASON, one a line, of packages or MODULE:NAME."""
    lines = ALLOWED.read_text().splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return dict(pairs)


def missing(
    modules: Iterable[str], has_top: Callable[[str], bool], *, look_up_names: bool
) -> dict[str, Statement]:
    """What no statement may find, by the name that `allowed` would have, and who asks for it first.

    Args:
        has_top: Whether a package is there.
        look_up_names: Also import what is imported from torch and others, and look for the names.
    """
    found: dict[str, Statement] = {}
    for module in sorted(modules):
        for each in statements_of(module):
            if each.top in OURS:
                if source_of(each.module) is None and not _is_there(each.module):
                    found.setdefault(each.module, each)
            elif not has_top(each.top):
                found.setdefault(each.top, each)
            elif look_up_names and each.top in NAMES_CHECKED and not _has_name(each):
                found.setdefault(f"{each.module}:{each.name}", each)
    return found


def is_installed(top: str) -> bool:
    """Whether Python finds a package of that name here."""
    return top in sys.builtin_module_names or _is_there(top)


@cache
def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@cache
def _has_name(each: Statement) -> bool:
    try:
        module = importlib.import_module(each.module)
    except ImportError:
        return False
    return (
        not each.name
        or each.name == "*"
        or hasattr(module, each.name)
        or _is_there(f"{each.module}.{each.name}")
    )
