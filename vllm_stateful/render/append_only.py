# SPDX-License-Identifier: Apache-2.0
"""Which chat templates write each message on its own, so that old messages need no rendering.

A template is called *append-only* when the text of a message depends only on that message, on the
one before it, on whether it is the first, and on things that no later message can change. The text
of a longer conversation then begins with the text of the shorter one. This is decided from the
template's syntax tree, not from examples. Everything that is not known to be harmless makes the
template not append-only: a look at the next or the last message, counting, namespaces that the loop
changes.
"""

from __future__ import annotations

from functools import lru_cache

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_FORBIDDEN = (
    *(nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block),
    *(nodes.CallBlock, nodes.FilterBlock, nodes.NSRef, nodes.Break),
)
_PURE_FUNCTIONS = {"raise_exception", "range", "dict"}
_MESSAGES, _LOOP, _AT_THE_END = "messages", "loop", "add_generation_prompt"


@lru_cache(maxsize=64)
def is_append_only(source: str) -> bool:
    """Whether a chat template writes each message on its own.

    Args:
        source: the text of the Jinja template. One that cannot be parsed is not append-only.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(source)
    except TemplateError:
        return False
    loops = [node for node in tree.body if isinstance(node, nodes.For) and _is_main_loop(node)]
    if len(loops) != 1 or len(list(_loads_of(tree, _MESSAGES))) == 0:
        return False
    behind = tree.body[tree.body.index(loops[0]) + 1 :]
    if not all(map(_is_only_a_generation_prompt, behind)):
        return False
    if not _decides_only_at_the_end(tree, behind):
        return False
    macros = {node.name for node in tree.find_all(nodes.Macro)}
    return _is_harmless(tree, loops[0], macros, in_main_loop=False, in_inner_loop=False)


def _is_main_loop(node: nodes.For) -> bool:
    """``{% for NAME in messages %}``, unfiltered and not recursive."""
    return (
        isinstance(node.iter, nodes.Name)
        and node.iter.name == _MESSAGES
        and isinstance(node.target, nodes.Name)
        and node.test is None
        and not node.recursive
    )


def _is_only_a_generation_prompt(node: nodes.Node) -> bool:
    """Whether a node behind the messages writes only if ``add_generation_prompt`` is set."""
    if isinstance(node, nodes.If):
        asks = _is_name(node.test, _AT_THE_END)
        return asks and not node.elif_ and not node.else_
    return isinstance(node, (nodes.Assign, nodes.Macro))


def _decides_only_at_the_end(tree: nodes.Template, behind: list[nodes.Node]) -> bool:
    """Whether ``add_generation_prompt`` is read only behind the messages.

    It is set when a prompt is rendered, but not for the part that a later prompt begins with, so no
    message may depend on it. A default for it may stand anywhere:
    ``{% if add_generation_prompt is not defined %}{% set ... %}{% endif %}``.
    """
    let_through = sum(isinstance(node, nodes.If) for node in behind)
    let_through += sum(_is_a_default(node) for node in tree.body)
    loads = [node for node in _loads_of(tree, _AT_THE_END) if node.ctx == "load"]
    return len(loads) == let_through


def _is_a_default(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.If)
        and isinstance(node.test, nodes.Not)
        and isinstance(node.test.node, nodes.Test)
        and node.test.node.name == "defined"
        and _is_name(node.test.node.node, _AT_THE_END)
        and not node.elif_
        and not node.else_
        and all(_is_constant(each) for each in node.body)
    )


def _is_constant(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.Assign)
        and _is_name(node.target, _AT_THE_END)
        and isinstance(node.node, nodes.Const)
    )


def _loads_of(tree: nodes.Node, name: str) -> list[nodes.Name]:
    return [node for node in tree.find_all(nodes.Name) if node.name == name]


def _is_harmless(
    node: nodes.Node,
    main: nodes.For,
    macros: set[str],
    *,
    in_main_loop: bool,
    in_inner_loop: bool,
) -> bool:
    """Whether everything in the tree below ``node`` is known to be harmless."""
    if _is_first_message(node) or (in_main_loop and _is_message_before(node)):
        return not in_inner_loop or _is_first_message(node)
    if isinstance(node, _FORBIDDEN):
        return False
    if isinstance(node, nodes.Getattr) and _is_name(node.node, _LOOP):
        return in_inner_loop or (in_main_loop and node.attr == "first")
    if isinstance(node, nodes.Name) and node.name in (_MESSAGES, _LOOP):
        return False  # any use that was not allowed above
    if isinstance(node, nodes.Call) and not _is_known_call(node, macros):
        return False
    if isinstance(node, nodes.Filter) and node.name == "random":
        return False
    for child in node.iter_child_nodes():
        if node is main and child is main.iter:
            continue
        inside = node is main and child in main.body
        inner = isinstance(node, nodes.For) and node is not main and child in node.body
        if not _is_harmless(
            child,
            main,
            macros,
            in_main_loop=in_main_loop or inside,
            in_inner_loop=in_inner_loop or inner,
        ):
            return False
    return True


def _is_known_call(node: nodes.Call, macros: set[str]) -> bool:
    """Whether a call is of a value's method, a macro of the template, or a pure function."""
    return not isinstance(node.node, nodes.Name) or node.node.name in _PURE_FUNCTIONS | macros


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _is_first_message(node: nodes.Node) -> bool:
    """``messages[0]``."""
    return (
        isinstance(node, nodes.Getitem)
        and _is_name(node.node, _MESSAGES)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == 0
        and node.arg.value is not False
    )


def _is_message_before(node: nodes.Node) -> bool:
    """``messages[loop.index0 - 1]``."""
    return (
        isinstance(node, nodes.Getitem)
        and _is_name(node.node, _MESSAGES)
        and isinstance(node.arg, nodes.Sub)
        and isinstance(node.arg.left, nodes.Getattr)
        and _is_name(node.arg.left.node, _LOOP)
        and node.arg.left.attr == "index0"
        and isinstance(node.arg.right, nodes.Const)
        and node.arg.right.value == 1
    )
