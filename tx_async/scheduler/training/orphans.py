"""Snapshots that nobody knows of: their files were written, or half written, when the worker or the server died, and
the journal never heard of them.

The search takes three steps, so that it can never delete a snapshot that is just being taken: the folder is listed; the
list is compared with what the run knows *then*; snapshots that it does not know are deleted. A snapshot taken after the
listing is not in it, because no name is used twice.
"""

from __future__ import annotations

from collections.abc import Collection

from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.facts import FilesListed
from tx_async.scheduler.training.lanes import Lane
from tx_async.scheduler.training.runs import Runs, snapshots_of

LOOK_AFTER_S = 60.0
"""How long after a death: until then a process that was given up may still be writing."""
LOOKS_PER_TICK = 16


class Orphans:
    def __init__(self, runs: Runs, decisions: Decisions):
        self.runs = runs
        self.decisions = decisions

    def look(self) -> None:
        """Have the folders of some runs listed, after the death of a worker or server."""
        limit = self.decisions.now - LOOK_AFTER_S
        due = [model_id for model_id, since in self.runs.littered.items() if since <= limit]
        for model_id in due[:LOOKS_PER_TICK]:
            del self.runs.littered[model_id]
            if model_id in self.runs.lanes:
                self.decisions.list_files(model_id, snapshots_of(model_id))

    def found(self, fact: FilesListed) -> None:
        lane = self.runs.lanes.get(fact.model_id)
        if lane is None:
            return
        if fact.keys is None:  # storage did not answer
            self.runs.littered[fact.model_id] = self.decisions.now
            return
        for folder in _folders(fact.keys) - _known(lane):
            self.decisions.delete_files(folder)


def _folders(keys: Collection[str]) -> set[str]:
    """Each snapshot is a folder of files."""
    return {key.rpartition("/")[0] for key in keys}


def _known(lane: Lane) -> set[str]:
    return {snapshot.key for snapshot in lane.known_snapshots()}
