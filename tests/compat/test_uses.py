# SPDX-License-Identifier: Apache-2.0
"""What adapters use of vLLM stands in the ledger, and the installed vLLM has it as recorded."""

import argparse
import array
import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import logging
import multiprocessing
import os
import queue
import re
import sys
import tempfile
import textwrap
import threading
import time
import types
import uuid
import weakref
from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

import fastapi
import msgspec
import numpy as np
import prometheus_client
import pydantic
import starlette.routing
import tokenizers
import torch
import triton
import triton.language as tl
from vllm.logger import init_logger

from vllm_stateful.compat import probe, uses
from vllm_stateful.compat.patch import UseDriftError
from vllm_stateful.compat.shapes import Live, Source

ROOT = Path(uses.__file__).parents[1]
SITE = Path(str(importlib.util.find_spec("vllm").origin)).parents[1]  # type: ignore[union-attr]
SERIES = str(probe.series_of(probe.vllm_version()))

EVERYWHERE = {"vllm.logger:init_logger", "vllm:envs", "vllm.platforms:current_platform"}
"""Used in every process before anything can be looked at; each vLLM since 0.6 has them."""

OTHERS: tuple[Any, ...] = (
    *(str, bytes, list, dict, set, frozenset, tuple, int, float, object, type, Exception),
    *(array.array, memoryview, types.FunctionType, types.ModuleType, collections, asyncio),
    *(collections.deque, collections.OrderedDict, re, re.Pattern, re.Match, threading, weakref),
    *(inspect, inspect.Parameter, inspect.Signature, os, time, uuid, queue.Queue, itertools),
    *(argparse, argparse.ArgumentParser, argparse.Action, logging.Logger, multiprocessing),
    *(dataclasses, concurrent.futures.Future, concurrent.futures.ThreadPoolExecutor, Path),
    *(asyncio.Task, asyncio.Future, asyncio.AbstractEventLoop, asyncio.Queue, HTTPStatus, hashlib),
    *(importlib, importlib.metadata, ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments),
    *(np, np.ndarray, torch, torch.Tensor, torch.cuda, triton, tl, msgspec, msgspec.json),
    *(fastapi.FastAPI, fastapi.APIRouter, starlette.routing.Route, fastapi.routing.APIRoute),
    *(pydantic.BaseModel, prometheus_client.Counter, prometheus_client.Histogram),
    *(tokenizers.Tokenizer, threading.Lock(), types.CodeType, os.environ, sys, HTTPStatus.OK),
    *(torch.nn, msgspec.Struct, contextlib.ExitStack, collections.namedtuple("Any", "x")),
    *(argparse.ArgumentParser(), argparse.Action([], "any")),
    init_logger("vllm.stateful"),
    *(tempfile, textwrap, sys.stdout),
)
"""Whose attributes are not vLLM's."""

UNSEEN = {
    *("dependant", "dependencies", "get_added_tokens_decoder", "max_token_id"),  # of libraries
    *("hexdigest", "to_dict", "st_mtime", "st_mtime_ns", "st_size"),  # of libraries
    *("environment_variables", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_RUST_FRONTEND"),  # envs
    *("_q_scale", "_k_scale", "_v_scale"),  # set on a layer by a function
    "engine_client",  # of the app's state
    *("get_connector_class", "_get_connector_classes_and_configs"),  # they return an alias
    *("model_tag", "chat_template"),  # of vLLM's command line
}
"""Attributes that no class tells of."""


def adapters() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("adapters", "compat/patches"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield str(node.module), alias.name


def test_whatever_is_imported_from_vllm_stands_in_the_ledger() -> None:
    known = {use.owner for use in uses.USES}
    known |= {f"{use.owner}:{name}" for use in uses.USES for name in use.members}
    wanted = {
        f"{module}:{name}"
        for file, tree in adapters()
        for module, name in imports(tree)
        if file.startswith("adapters/") and not module.startswith("vllm.triton_utils")
    }
    assert not sorted(wanted - known - EVERYWHERE)


ENTRIES = (
    ("sessions", "engine", "engine.scheduler"),
    ("sessions", "api", "frontend.identity"),
    ("transport", "api", "frontend.prompt_sender"),
    ("transport", "engine", "engine.prompt_receiver"),
    ("renderer", "api", "frontend.renderer"),
    ("messages", "api", "frontend.messages"),
    ("endpoint", "api", "frontend.endpoint"),
    ("responses", "api", "frontend.response_cache"),
    ("responses", "engine", "engine.engine_utility"),
    ("tool-call-check", "api", "frontend.tool_call_check"),
    ("anthropic-usage", "api", "frontend.anthropic_usage"),
    ("detokenize", "api", "frontend.detokenizer"),
    ("offload", "engine", "engine.offload_tier"),
    ("offload", "engine", "session_files"),
    ("worker-ids", "engine", "engine.worker_ids"),
    ("worker-ids", "worker", "worker.staged_ids"),
    ("device-drafts", "worker", "worker.lookup_speculator"),
    ("shared-prefixes", "worker", "worker.batch_prefixes"),
    ("attention-cuda", "worker", "worker.attention_backend"),
    ("attention-cpu", "worker", "worker.cpu_attention_backend"),
)
"""By feature and process the adapter that is imported first."""


MODULES = {
    ".".join(path.relative_to(ROOT / "adapters").with_suffix("").parts)
    for path in (ROOT / "adapters").rglob("*.py")
    if path.stem != "__init__"
}


def needed_by(module: str) -> set[str]:
    """The names of vLLM without which an adapter cannot be imported."""
    names: set[str] = set()
    waiting, seen = [module], {module}
    while waiting:
        path = ROOT / "adapters" / f"{waiting.pop().replace('.', '/')}.py"
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if not isinstance(node, ast.ImportFrom):
                continue
            source = node.module or ""
            if source == "vllm" or source.startswith("vllm."):
                names |= {f"{source}:{alias.name}" for alias in node.names}
            if source.startswith("vllm_stateful.adapters"):
                within = source.removeprefix("vllm_stateful.adapters").lstrip(".")
                named = [f"{within}.{alias.name}".lstrip(".") for alias in node.names]
                modules = {within, *named} & MODULES
                waiting += modules - seen
                seen |= modules
    return names


@pytest.mark.parametrize(("feature", "process", "module"), ENTRIES)
def test_a_feature_is_checked_for_all_that_its_code_imports(
    feature: str, process: str, module: str
) -> None:
    features = (feature, *uses.NEEDS.get(feature, ()))
    checked = [u for u in uses.USES if u.feature in features and u.process in (process, "all")]
    known = {use.owner for use in checked}
    known |= {f"{use.owner}:{name}" for use in checked for name in use.members}
    missing = {n for n in needed_by(module) if not n.startswith("vllm.triton_utils:")}
    assert not sorted(missing - known - EVERYWHERE)


def names_of_ours() -> set[str]:
    """Whatever this package defines: functions, classes, fields, attributes, variables."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for part in (part for target in targets for part in ast.walk(target)):
                    if isinstance(part, ast.Name):
                        found.add(part.id)
                    elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                        found.add(part.attr)
    return found


def test_whatever_attribute_is_asked_for_is_ours_or_stands_in_the_ledger() -> None:
    known = names_of_ours() | UNSEEN
    known |= {name for use in uses.USES for name in use.members}
    known |= {name for other in OTHERS for name in dir(other)}
    unknown = {
        f"{file}: .{node.attr}"
        for file, tree in adapters()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr not in known
        if not node.attr.startswith("stateful_")  # of ours, on objects of vLLM's
    }
    assert not sorted(unknown)


@cache
def source() -> Source:
    return Source(SITE)


def test_whatever_is_overridden_stands_in_the_ledger() -> None:
    ledger = {use.owner: use for use in uses.USES if use.overrides}
    missing = set()
    for file, tree in adapters():
        origin = {name: module for module, name in imports(tree)}
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                if not isinstance(base, ast.Name) or base.id not in origin:
                    continue
                owner = f"{origin[base.id]}:{base.id}"
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                methods |= {e.name for e in node.body if isinstance(e, ast.AsyncFunctionDef)}
                known = set(ledger[owner].members) if owner in ledger else set()
                for name in methods - known - {"__init__", "__bool__", "__len__", "__iter__"}:
                    if source().shape(owner, name) is not None:
                        missing.add(f"{file}: {owner}.{name}")
    assert not sorted(missing)


@pytest.mark.parametrize("feature", sorted({use.feature for use in uses.USES}))
def test_the_installed_vllm_is_as_recorded(feature: str) -> None:
    uses.check(feature, frozenset({"api", "engine", "worker", "all"}))


def test_both_readers_say_the_same() -> None:
    live = Live()
    for use in uses.USES:
        for name in use.members:
            assert source().shape(use.owner, name) == live.shape(use.owner, name), (use, name)
        for name in use.overrides.split():
            for caller in use.asked_by.split():
                asked = live.mentions(caller, name)
                assert source().mentions(caller, name) == asked, (use, name, caller)


def test_a_series_records_only_what_is_other() -> None:
    for major, minor in probe.SUPPORTED:
        series = f"{major}.{minor}"
        if series == uses.FIRST:
            continue
        path = ROOT / "compat" / f"v{major}_{minor}" / "shapes.json"
        first = uses.shapes_of(uses.FIRST)
        for owner, members in msgspec.json.decode(path.read_bytes()).items():
            for name, shape in members.items():
                assert first[owner][name] != shape


# ---- what has drifted ----------------------------------------------------------------------------


class Changed(Live):
    """The installed vLLM, but for one member."""

    def __init__(self, name: str, shape: str | None) -> None:
        self.name, self.is_now = name, shape

    def shape(self, owner: str, name: str) -> str | None:
        return self.is_now if name == self.name else super().shape(owner, name)

    def mentions(self, owner: str, name: str) -> bool:
        return name != self.name and super().mentions(owner, name)


@pytest.mark.parametrize("shape", [None, "(self, request, more)", "attribute"])
def test_one_line_names_what_has_drifted(
    shape: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uses, "Live", lambda: Changed("get_computed_blocks", shape))
    uses.check.cache_clear()
    with pytest.raises(UseDriftError) as error:
        uses.check("sessions", frozenset({"engine"}))
    uses.check.cache_clear()
    text = str(error.value)
    assert "\n" not in text
    assert "KVCacheManager.get_computed_blocks" in text
    assert ("does not exist" in text) == (shape is None)


def test_an_override_that_nobody_asks_for_has_drifted() -> None:
    reader = Changed("allocate_slots", uses.shapes_of(SERIES)[_MANAGER]["allocate_slots"])
    (drift,) = uses.drifts([u for u in uses.USES if u.owner == _MANAGER], SERIES, reader)
    assert "asked for by nobody" in str(drift)


_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
