"""What an installation gets: one version, types, contracts and templates, and a way to the project's pages."""

import re
import tomllib
from pathlib import Path

import tx_async

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "tx_async/__init__.py"
    places = [
        str(path.relative_to(ROOT))
        for folder in ("tx_async", "schemas")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"^__version__ =", path.read_text(), re.MULTILINE)
    ]
    assert places == ["tx_async/__init__.py"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tx_async.__version__)


def test_an_installation_is_typed_and_has_the_contracts():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["tx_async"] and wheel["force-include"] == {"schemas": "tx_async/schemas"}
    assert (ROOT / "tx_async/py.typed").exists() and "Typing :: Typed" in PROJECT["classifiers"]


def test_what_a_stranger_looks_for_is_there():
    assert {"Changelog", "Documentation", "Issues", "Source"} <= set(PROJECT["urls"])
    assert all(
        (ROOT / name).exists() for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md")
    )
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_python_is_the_one_that_tools_check_for():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert PYPROJECT["tool"]["pyright"]["pythonVersion"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]
