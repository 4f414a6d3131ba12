"""Documentation is tested: what can be set, called or run stands on its page, and generated files are not stale."""

import re
from pathlib import Path

import msgspec
import pytest

from tx_async import schemas
from tx_async.api.routes import ROUTES
from tx_async.cli import command_docs
from tx_async.config import ServerConfig
from tx_async.dispatch.frames import EnvelopeFromWorker, EnvelopeToWorker, decode_from_worker, decode_to_worker
from tx_async.testing import messages
from tx_async.wire.worker import EngineConfig, FromWorker, ToWorker

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
]


def page(name: str) -> str:
    return (ROOT / "schemas" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", [*ServerConfig.__struct_fields__, *EngineConfig.__struct_fields__])
def test_every_setting_is_on_its_page(name):
    assert f"| `{name}` |" in page("settings")


@pytest.mark.parametrize("row", ROUTES, ids=lambda row: f"{row.method} {row.path}")
def test_every_route_is_on_its_page(row):
    assert f"| {row.method} | `{row.path}` |" in page("routes")


@pytest.mark.parametrize(("command", "summary", "flags"), command_docs())
def test_every_command_and_its_flags_are_on_their_page(command, summary, flags):
    assert f"| {command} | {summary} | {flags} |" in page("commands")


@pytest.mark.parametrize("path", sorted(schemas.generated_files(command_docs())), ids=lambda path: path.name)
def test_generated_files_are_fresh(path):
    assert path not in schemas.stale_files(command_docs()), "run: tx-async schemas"


def test_the_readme_begins_with_the_two_commands_that_ci_takes_from_it():
    commands = re.findall(r"^```bash\n(.+)\n```$", README.split("\n## ")[0], re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("tx-async demo")
    assert "-m pytest" in commands[1]
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert "grep -m1 -- '-m pytest' README.md" in (ROOT / ".ci/run").read_text()


def test_the_readme_is_read_to_its_end():
    """Words outside code: a newcomer's page, not a manual."""
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 1300


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"`((?:\w+/)+[\w.-]*)`", README)
    assert len(named) > 30
    assert not [path for path in named if not (ROOT / path).exists() and not (ROOT / "tx_async" / path).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


def test_constraints_pin_every_dependency_and_name_no_host():
    lines = [line for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version (<|>=) "3\.12")?', line) for line in lines)
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    direct = set(re.findall(r'^  "([\w-]+)(?:\[\w+\])?>=', project, re.MULTILINE))
    assert len(direct) > 20
    assert {name.lower().replace("_", "-") for name in direct} <= pinned


# ---- the worker protocol, as its golden messages show it


@pytest.mark.parametrize(
    ("union", "examples"), [(ToWorker, messages.to_worker()), (FromWorker, messages.from_worker())], ids=["to", "from"]
)
def test_the_golden_messages_show_every_message(union, examples):
    assert {type(message) for message in examples} == set(union.__args__)


def test_golden_headers_decode_to_the_messages_that_they_show():
    """What an engine in another language sends: the recorded bytes, not what this version happens to encode."""
    golden = msgspec.json.decode((ROOT / "schemas/worker/examples.json").read_bytes())
    for example in golden["to_worker"]:
        decoded = decode_to_worker(bytes.fromhex(example["header"]))
        assert decoded == EnvelopeToWorker(msgspec.convert(example["message"], ToWorker))
    for example in golden["from_worker"]:
        decoded = decode_from_worker(bytes.fromhex(example["header"]))
        assert decoded == EnvelopeFromWorker(msgspec.convert(example["message"], FromWorker))
