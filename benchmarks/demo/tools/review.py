# SPDX-License-Identifier: Apache-2.0
"""Tools of the code reviewer: they read, run and trace the two modules in `samples/`."""

import ast
import difflib
import runpy
import sys
import tempfile
import traceback
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.demo.tools.tool import Tool, choice, flag, whole

Test = Callable[[], None]

SAMPLES = Path(__file__).with_name("samples")
FILES = {"pricing.py": "pricing.txt", "inventory.py": "inventory.txt"}
RULES = ["all", "bugs", "style"]
# Pull requests against the samples: the file, and the text that takes another's place.
PULL_REQUESTS = {
    "41": (
        "pricing.py",
        [
            ("total, customer, history=[]", "total, customer, history=None"),
            ("    history.append(total)\n", ""),
            ("    if total > 500:", "    if 500 < total <= 5000:"),
        ],
    ),
    "42": (
        "inventory.py",
        [
            ("raise LookupError(article)", "raise LookupError(f'{article}: not enough')"),
            ("    def ship(self, article, count):\n", "    def ship(self, article, count=1):\n"),
        ],
    ),
}
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.BoolOp, ast.comprehension)


def analyze_code(path: str, include_private: bool, max_complexity: int) -> dict[str, Any]:
    """Size, branches and documentation of every function outside the tests."""
    rows = []
    for node in _functions(ast.parse(_source(path))):
        is_private = node.name.startswith("_")
        if node.name.startswith("test_") or (is_private and not include_private):
            continue
        complexity = 1 + sum(isinstance(child, BRANCHES) for child in ast.walk(node))
        rows.append(
            {
                "function": node.name,
                "line": node.lineno,
                "lines": (node.end_lineno or node.lineno) - node.lineno + 1,
                "arguments": len(node.args.args),
                "complexity": complexity,
                "too_complex": complexity > max_complexity,
                "documented": ast.get_docstring(node) is not None,
            }
        )
    return {"path": path, "functions": rows}


def run_tests(path: str, fail_fast: bool, repeat: int) -> dict[str, Any]:
    """Run the module's own tests; a test counts as failed when one of its runs fails."""
    results: list[dict[str, Any]] = []
    for name, test in _tests(SAMPLES / FILES[path]):
        error = next((e for e in (_error_of(test) for _ in range(repeat)) if e is not None), None)
        row: dict[str, Any] = {
            "test": name,
            "outcome": "passed" if error is None else "failed",
            "runs": repeat,
        }
        if error is not None:
            row |= {"error": type(error).__name__, "line": _last_line(error)}
        results.append(row)
        if fail_fast and error is not None:
            break
    failed = sum(row["outcome"] == "failed" for row in results)
    return {"path": path, "passed": len(results) - failed, "failed": failed, "tests": results}


def check_coverage(path: str, threshold_percent: int, show_missing: bool) -> dict[str, Any]:
    """Which lines of each function the tests reach, seen by the interpreter's tracer."""
    reached = _traced_lines(path)
    rows = []
    for node in _functions(ast.parse(_source(path))):
        if node.name.startswith("test_"):
            continue
        lines = _statement_lines(node)
        missing = sorted(lines - reached)
        percent = round(100 * (1 - len(missing) / len(lines)), 1)
        row: dict[str, Any] = {"function": node.name, "statements": len(lines), "percent": percent}
        row["enough"] = percent >= threshold_percent
        if show_missing:
            row["missing_lines"] = missing
        rows.append(row)
    return {"path": path, "threshold_percent": threshold_percent, "functions": rows}


def lint_code(path: str, rules: str, max_line_length: int) -> dict[str, Any]:
    """A few checks of the usual linters."""
    source = _source(path)
    issues = [issue for issue in _lint(source, max_line_length) if rules in ("all", issue["kind"])]
    issues.sort(key=lambda issue: issue["line"])
    return {"path": path, "rules": rules, "count": len(issues), "issues": issues}


def review_pr(number: str, context_lines: int, run_checks: bool) -> dict[str, Any]:
    """The diff of a pull request, its size, and its tests before and after."""
    path, changes = PULL_REQUESTS[number]
    before = after = _source(path)
    for old, new in changes:
        after = after.replace(old, new, 1)
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), path, path, n=context_lines, lineterm=""
    )
    diff = list(lines)
    result: dict[str, Any] = {
        "number": int(number),
        "path": path,
        "added": sum(line.startswith("+") for line in diff) - 1,
        "removed": sum(line.startswith("-") for line in diff) - 1,
        "diff": "\n".join(diff),
    }
    if run_checks:
        result["failed_before"] = _failures(before)
        result["failed_after"] = _failures(after)
    return result


def _source(path: str) -> str:
    return (SAMPLES / FILES[path]).read_text()


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _tests(file: Path) -> list[tuple[str, Test]]:
    """The tests in a file, loaded into a namespace of their own."""
    namespace = runpy.run_path(str(file), run_name="sample")
    return [(name, value) for name, value in namespace.items() if name.startswith("test_")]


class _KeepError(unittest.TestResult):
    """Keeps the exception of the test that ran."""

    error: BaseException | None = None

    def addError(self, test: Any, err: Any) -> None:
        self.error = err[1]

    def addFailure(self, test: Any, err: Any) -> None:
        self.error = err[1]


def _error_of(test: Test) -> BaseException | None:
    result = _KeepError()
    unittest.FunctionTestCase(test).run(result)
    return result.error


def _last_line(error: BaseException) -> int | None:
    """Line of the sample in which the error was raised."""
    return traceback.extract_tb(error.__traceback__)[-1].lineno


def _failures(source: str) -> list[str]:
    """Names of the tests that fail in this text of a module."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sample.txt")
        file.write_text(source)
        return [name for name, test in _tests(file) if _error_of(test) is not None]


def _traced_lines(path: str) -> set[int]:
    """Line numbers of the sample that its tests execute."""
    reached: set[int] = set()
    file = SAMPLES / FILES[path]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_code.co_filename == str(file):
            reached.add(frame.f_lineno)
        return trace

    tests = _tests(file)
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        for _, test in tests:
            _error_of(test)
    finally:
        sys.settrace(previous)
    return reached


def _statement_lines(node: ast.FunctionDef) -> set[int]:
    """First lines of the statements in a function's body, its docstring left out."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    statements = (part for top in body for part in ast.walk(top) if isinstance(part, ast.stmt))
    return {part.lineno for part in statements}


def _lint(source: str, max_line_length: int) -> Iterator[dict[str, Any]]:
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield _issue(node.lineno, "bugs", "E722", "bare except hides every error")
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant):
            yield _issue(node.lineno, "bugs", "B011", "assert on a constant")
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name not in names:
                    yield _issue(node.lineno, "style", "F401", f"{alias.name} is not used")
    for node in _functions(tree):
        if any(isinstance(default, ast.List | ast.Dict) for default in node.args.defaults):
            yield _issue(node.lineno, "bugs", "B006", f"mutable default in {node.name}")
        if not node.name.startswith("test_") and ast.get_docstring(node) is None:
            yield _issue(node.lineno, "style", "D103", f"no docstring in {node.name}")
    for line, text in enumerate(source.splitlines(), start=1):
        if len(text) > max_line_length:
            yield _issue(line, "style", "E501", f"line has {len(text)} characters")


def _issue(line: int, kind: str, code: str, text: str) -> dict[str, Any]:
    return {"line": line, "kind": kind, "code": code, "text": text}


PATH = choice(FILES, "Path of the module in the repository under review.")

REVIEW_TOOLS = (
    Tool(
        analyze_code,
        "Measure every function of a module: first line, size, number of arguments, cyclomatic "
        "complexity and whether it has a docstring. Start a review with it to see where the risk "
        "lies. Tests are left out of the answer.",
        {
            "path": PATH,
            "include_private": flag("Also report functions whose name starts with an underscore."),
            "max_complexity": whole(2, 12, "Complexity above which a function is flagged."),
        },
    ),
    Tool(
        run_tests,
        "Run all tests of a module and report each test with its outcome; for a failure also the "
        "error and the line where it was raised. Run the tests before commenting on behaviour, "
        "and again for every claim that something is broken.",
        {
            "path": PATH,
            "fail_fast": flag("Stop at the first failing test."),
            "repeat": whole(1, 5, "How often each test runs; more than once finds flaky tests."),
        },
    ),
    Tool(
        check_coverage,
        "Trace the tests and report for each function how many of its statements were reached, in "
        "percent, with the numbers of the lines that were never executed. A function below the "
        "threshold needs a test before the change can be approved.",
        {
            "path": PATH,
            "threshold_percent": whole(
                50, 100, "Least coverage for a function to count as tested."
            ),
            "show_missing": flag("List the numbers of the lines that no test reaches."),
        },
    ),
    Tool(
        lint_code,
        "Check a module for common mistakes (bare except, mutable defaults, constant asserts) and "
        "for style (unused imports, missing docstrings, long lines). Each issue has a line, a "
        "kind, a code and a text.",
        {
            "path": PATH,
            "rules": choice(RULES, "Which issues to report."),
            "max_line_length": whole(72, 120, "Longest line allowed, in characters."),
        },
    ),
    Tool(
        review_pr,
        "Fetch a pull request: the unified diff, the number of added and removed lines, and which "
        "tests fail before and after the change. Call it before writing the verdict.",
        {
            "number": choice(PULL_REQUESTS, "Number of the pull request."),
            "context_lines": whole(1, 5, "Unchanged lines to show around each change."),
            "run_checks": flag("Run the tests before and after the change."),
        },
    ),
)
