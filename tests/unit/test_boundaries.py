# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and how long a file may be: rules, not intentions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_stateful"
FILES = sorted(PACKAGE.rglob("*.py"))
GLUE = {"adapters", "attention", "compat"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

PURE_PACKAGES = [
    "vllm_stateful",
    "vllm_stateful.types",
    "vllm_stateful.config",
    "vllm_stateful.errors",
    "vllm_stateful.plugin",
    "vllm_stateful.request",
    "vllm_stateful.prefix",
    "vllm_stateful.schedule",
    "vllm_stateful.answer",
    "vllm_stateful.speculate",
    "vllm_stateful.observe",
    "vllm_stateful.session",
    "vllm_stateful.cli",
    "vllm_stateful.render",
    "vllm_stateful.answer",
    "vllm_stateful.transport",
    "vllm_stateful.cli",
]

IMPORT_EACH = """
import importlib, pkgutil, sys
for name in sys.argv[1].split(","):
    module = importlib.import_module(name)
    if name.count("."):
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
            importlib.import_module(found.name)
    loaded = {"vllm", "torch"} & set(sys.modules)
    assert not loaded, f"importing {name} loads {sorted(loaded)}"
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_glue(path: Path) -> bool:
    return path.relative_to(PACKAGE).parts[0] in GLUE


def run_fresh(code: str, *arguments: str) -> None:
    """Run in an interpreter that has imported nothing, from a folder that holds nothing."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def imports_of(tree: ast.AST) -> set[str]:
    """Top-level packages that a file imports anywhere in it, relative imports left out."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_pure_packages_and_all_their_modules_load_neither_vllm_nor_torch() -> None:
    run_fresh(IMPORT_EACH, ",".join(PURE_PACKAGES))


def test_the_list_of_pure_packages_is_complete() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - GLUE
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert {f"vllm_stateful.{name}" for name in folders | modules} | {"vllm_stateful"} == set(
        PURE_PACKAGES
    )


def test_the_ledger_of_patches_loads_no_vllm() -> None:
    run_fresh(IMPORT_EACH, "vllm_stateful.compat.ledger")


def test_an_installed_plugin_that_nobody_asked_for_imports_nothing() -> None:
    code = (
        "import os, sys\n"
        "for key in [k for k in os.environ if k.startswith('VLLM_')]: del os.environ[key]\n"
        "from vllm_stateful.plugin import register\n"
        "before = set(sys.modules); register(); assert set(sys.modules) == before\n"
    )
    run_fresh(code)


@pytest.mark.parametrize("path", [path for path in FILES if not is_glue(path)], ids=name_of)
def test_only_adapters_and_compat_import_vllm_and_nothing_pure_imports_torch(path: Path) -> None:
    imported = imports_of(ast.parse(path.read_text()))
    assert not imported & {"vllm", "torch"}
    allowed = {"jinja2", "numba", "numpy", "vllm_stateful"} | set(sys.stdlib_module_names)
    if path.parent.name == "cli":
        allowed |= {"httpx", "rich"}  # which come with vLLM
    assert imported <= allowed


STAGE_IMPORTS = {
    "request": {"request"},
    "prefix": {"prefix", "schedule"},
    "schedule": {"schedule"},
    "observe": {"observe"},
    "session": {"session"},
    "render": {"render", "prefix", "transport"},
    "answer": {"answer"},
    "transport": {"transport"},
}
EVERYONE = {"config", "errors", "types"}
PROCESSES = {"frontend", "engine", "worker"}


@pytest.mark.parametrize("process", sorted(PROCESSES))
def test_a_process_imports_no_adapter_of_another(process: str) -> None:
    """What they say to each other stands in ``transport``."""
    others = {f"vllm_stateful.adapters.{other}" for other in PROCESSES - {process}}
    for path in (PACKAGE / "adapters" / process).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert not any(f"{module}.".startswith(f"{other}.") for other in others), path


@pytest.mark.parametrize("stage", STAGE_IMPORTS)
def test_a_stage_imports_the_stages_it_may(stage: str) -> None:
    imported = set()
    for path in (PACKAGE / stage).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "vllm_stateful."
            ):
                imported.add(str(node.module).split(".")[1])
    assert imported <= STAGE_IMPORTS[stage] | EVERYONE


def test_compat_imports_no_stage_and_no_adapter() -> None:
    for path in (PACKAGE / "compat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "vllm_stateful."
            ):
                assert str(node.module).split(".")[1] in EVERYONE | {"compat"}, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_starts_with_its_licence_and_is_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert len(lines) <= MAX_FILE_LINES
    assert ast.get_docstring(ast.parse("\n".join(lines))), "no module docstring"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_function_is_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("name", ["utils.py", "helpers.py", "manager.py", "common.py", "misc.py"])
def test_a_name_says_what_the_file_holds(name: str) -> None:
    assert not [name_of(path) for path in FILES if path.name == name]
