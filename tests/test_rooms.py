"""Rooms that a newcomer can take in: files in a folder, lines in a module, lines in a function; and every folder with a
README lists its files there."""

import ast
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tx_async"
SUPPORT = ROOT / "tests/support"
SCHEDULER_FILES_MAX = 14
MODULE_LINES_MAX = 450
FUNCTION_LINES_MEDIAN_MAX = 10
FUNCTION_LINES_NINE_IN_TEN_MAX = 20
NAMED_ALIKE = {
    "Request": "each client API in wire/ has its own base, with its own rules for unknown fields and null",
    "Answer": "the same for what OpenAI's and Anthropic's clients get",
    "AdamParams": "the same numbers as a client sends them and as a worker gets them, under Tinker's name",
}
"""Classes that share a name, and why they may."""
NAMED_ELSEWHERE = {"vllm/v1/sample/sampler.py"}
"""Files of other projects that text names."""
READMES = ("api/compatible", "dashboard", "dispatch", "journal", "scheduler", "storage", "worker")


def modules() -> list[Path]:
    return [path for folder in (PACKAGE, SUPPORT) for path in sorted(folder.rglob("*.py"))]


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def function_lengths(path: Path) -> Iterator[int]:
    """Lines of each function, without what stands above and inside its signature, and without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, last = node.body[0], node.body[-1]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            begin = first.end_lineno if is_docstring else first.lineno - 1
            assert last.end_lineno is not None and begin is not None
            yield last.end_lineno - begin


def test_the_scheduler_s_own_folder_is_small():
    """Its rooms hold the machine; README and `__init__.py` count."""
    files = [path for path in (PACKAGE / "scheduler").iterdir() if path.is_file()]
    assert len(files) <= SCHEDULER_FILES_MAX, sorted(path.name for path in files)


def test_no_module_is_long_but_the_lists_of_structs():
    long = {str(path.relative_to(ROOT)): num_lines(path) for path in modules() if num_lines(path) > MODULE_LINES_MAX}
    assert not {path: lines for path, lines in long.items() if "/wire/" not in path}


def test_functions_are_short():
    lengths = sorted(length for path in modules() for length in function_lengths(path))
    assert statistics.median(lengths) <= FUNCTION_LINES_MEDIAN_MAX
    assert lengths[len(lengths) * 9 // 10] <= FUNCTION_LINES_NINE_IN_TEN_MAX


def test_a_class_name_has_one_meaning():
    places = defaultdict[str, list[str]](list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    alike = {name: found for name, found in places.items() if len(found) > 1}
    assert not {name: found for name, found in alike.items() if name not in NAMED_ALIKE}
    assert alike.keys() == NAMED_ALIKE.keys(), "remove what is no longer needed"
    assert all("/wire/" in path for found in alike.values() for path in found)


@pytest.mark.parametrize("folder", READMES)
def test_a_folder_s_readme_lists_its_files(folder: str):
    text = (PACKAGE / folder / "README.md").read_text()
    names = {path.name for path in (PACKAGE / folder).rglob("*.py")} - {"__init__.py"}
    assert not {name for name in names if not text.count(f"`{name}`") + text.count(f"/{name}`")}


def test_python_files_that_text_names_are_there():
    """In docstrings, comments and READMEs a file's name stands in backquotes: it must not outlive the file."""
    folders = [ROOT / name for name in ("tx_async", "tests", "bench", "schemas")]
    texts = [*(path for folder in folders for path in folder.rglob("*.md")), *ROOT.glob("*.md"), *PACKAGE.rglob("*.py")]
    files = {f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*.py")}
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in re.findall(r"`((?:[\w./-]+/)?\w+\.py)`", path.read_text())
        if name not in NAMED_ELSEWHERE and not any(file.endswith(f"/{name.removeprefix('../')}") for file in files)
    ]
    assert not missing
