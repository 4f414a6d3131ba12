"""The state law: whatever changes the scheduler's state or its catalog is a fact to `SchedulerState.handle`."""

import ast
import logging
import typing
from pathlib import Path

import pytest

from tests.support.actor import running
from tests.support.stage import Stage
from tx_async.errors import StorageError
from tx_async.scheduler.core.facts import CheckpointDeleted, Fact, Tick
from tx_async.scheduler.core.instructions import Instruction
from tx_async.wire.facts import WorkerFact
from tx_async.wire.operations import SaveWeights

PACKAGE = Path(__file__).parents[2] / "tx_async"
STATE_VERBS = {"handle", "restore", "drain"}
"""What may be called on the state from outside, besides looking."""
READS = {"get", "values", "items", "keys", "check_turn", "find_request", "find_checkpoint", "audited", "rows"}


def outside_the_machine() -> list[Path]:
    """Everybody who can hold a scheduler, or a part of one."""
    folders = ("api", "dashboard", "scheduler/polls", "scheduler/stations")
    nested = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    return [*(PACKAGE / "scheduler").glob("*.py"), *nested, *PACKAGE.glob("*.py")]


def chain_of(node: ast.expr) -> list[str]:
    """`self.state.catalog.apply` as its names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Subscript):
        return [*chain_of(node.value), "[]", *reversed(names)]
    return [*([node.id] if isinstance(node, ast.Name) else []), *reversed(names)]


def reaches_in(names: list[str]) -> bool:
    """Into somebody's catalog or state; a variable of that name is no scheduler's."""
    return "catalog" in names[:-1] or "state" in names[1:-1]


def breaches(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            names = chain_of(node.func)
            if reaches_in(names) and names[-1] not in STATE_VERBS | READS:
                found.append(".".join(names))
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        targets += [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
        found += [".".join(names) for target in targets if reaches_in(names := chain_of(target))]
    return [f"{path.name}: {breach}" for breach in found if "app.state" not in breach]


def test_nothing_outside_the_machine_changes_the_state_or_the_catalog():
    """`catalog` may be handed on as the read-only view that it is outside."""
    assert not [breach for path in outside_the_machine() for breach in breaches(path)]


def test_the_test_above_sees_a_breach(tmp_path: Path):
    file = tmp_path / "shell.py"
    file.write_text("self.state.catalog.apply(changes)\nself.catalog.models['a'] = 1\nself.state.decisions.take()\n")
    assert len(breaches(file)) == 3


OWNERS = {"lane": "lanes.py", "step": "lanes.py", "worker": "worker_state.py"}
"""What the machine's files call the objects that have verbs, and the file of their verbs."""


def test_lanes_steps_and_workers_are_changed_by_their_verbs_alone():
    """One owner of each field: whoever looks for what changes it finds it in one file."""
    wrong: list[str] = []
    for path in sorted((PACKAGE / "scheduler").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                *_, owner, field = ["", *chain_of(node)]
                if owner in OWNERS and path.name != OWNERS[owner]:
                    wrong.append(f"{path.name}: {owner}.{field}")
    assert not wrong


@pytest.mark.parametrize("fact", typing.get_args(Fact) + typing.get_args(WorkerFact), ids=lambda fact: fact.__name__)
def test_every_fact_has_a_cause(fact: type):
    assert isinstance(fact.__dict__["cause"], property)


@pytest.mark.parametrize("instruction", typing.get_args(Instruction), ids=lambda instruction: instruction.__name__)
def test_every_instruction_has_room_for_the_cause(instruction: type):
    assert "cause" in instruction.__struct_fields__  # type: ignore[attr-defined]


def test_instructions_carry_the_cause_of_their_fact(stage: Stage):
    model = stage.model()
    request = stage.forward_backward(model, 1)
    sent = stage.commands_caused_by(request)
    assert sent and all(type(command).__name__ in ("CreateAdapter", "TrainMicroBatch") for command in sent)


def test_time_that_passes_is_a_cause_too(stage: Stage):
    model = stage.model()
    stage.train(model, 2)
    stage.run()
    stage.now += stage.policy.snapshot_idle_s + 1
    stage.handle(Tick())
    assert [type(command).__name__ for command in stage.commands_caused_by("tick")] == ["SaveAdapter"]


async def test_a_log_line_says_what_it_was_about(caplog: pytest.LogCaptureFixture):
    from tests.scheduler.test_scheduler import MODEL, result_of, with_model

    async def refuse(key: str) -> None:
        raise StorageError("the bucket is gone")

    async with running() as server:
        scheduler = await with_model(server)
        scheduler.performer._delete_files = refuse
        save = await scheduler.submit("alice", SaveWeights(model_id=MODEL, seq_id=1, kind="weights", name="a"))
        await result_of(scheduler, save.request_id)
        path = f"tinker://{MODEL}/weights/a"
        with caplog.at_level(logging.DEBUG, "tx_async.scheduler"):
            await scheduler.delete_checkpoint("alice", path)
        lines = [record.getMessage() for record in caplog.records]
        assert CheckpointDeleted(path).cause == path
        assert any(line.startswith(f"{path}: Append, DeleteFiles") for line in lines), lines
        assert any(line.startswith(f"{path}: files of") and "the bucket is gone" in line for line in lines), lines
