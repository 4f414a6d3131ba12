"""Collects what one scrape of `GET /metrics` reports of the running server, and decides who may read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import anyio
from prometheus_client.metrics_core import Metric
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tx_async.api.errors import error_response
from tx_async.api.gate import Gate
from tx_async.api.owner import Owners, key_of, reached_at
from tx_async.config import ServerConfig
from tx_async.dispatch.router import Router
from tx_async.errors import UserError
from tx_async.metrics import Metrics, Scrape, counter_by, families_of, gauge_by
from tx_async.scheduler.core.worker_state import CAUSES
from tx_async.scheduler.scheduler import Scheduler
from tx_async.scheduler.statistics import sampling_statistics_of

BYTES_OF = ("queued", "records", "checkpoints", "recordings")
"""What a key's bytes are for: bodies of its open requests; its sessions, runs and samplers; its checkpoints; its
recorded sequences."""
NO_ROLE = "any"
"""The role of keys that no registry knows: all keys where there is no registry, otherwise those that were revoked."""


def families(
    scheduler: Scheduler, router: Router, roles: Mapping[str, tuple[str, str]], by_key: bool
) -> Iterator[Metric]:
    """Metrics beside the actors' statistics. roles: owner -> (role, id) of each registered key."""
    yield from families_of("", router.worker_statistics())
    yield from families_of("", sampling_statistics_of(scheduler.state))
    failures = scheduler.state.training.failures
    yield counter_by(
        "failed",
        "Checkpoints that were not saved, and snapshots that were not taken, by cause.",
        ("operation", "cause"),
        {(what, cause): failures[what, cause] for what in ("save", "snapshot") for cause in CAUSES},
    )
    yield gauge_by(
        "key_bytes",
        "Bytes of keys, by what they are and by the keys' role; by key where metrics_by_key says so.",
        ("of", "role", "key"),
        key_bytes(scheduler, roles, by_key),
    )


def key_bytes(
    scheduler: Scheduler, roles: Mapping[str, tuple[str, str]], by_key: bool
) -> Mapping[tuple[str, ...], float]:
    catalog = scheduler.catalog
    parts = (scheduler.quota.bytes.parts, catalog.holdings.num_bytes, catalog.holdings.checkpoint_bytes)
    found: Counter[tuple[str, ...]] = Counter()
    for of, owners in zip(BYTES_OF, (*parts, catalog.recordings.num_bytes), strict=True):
        for role in ("user", "admin", NO_ROLE):
            found[of, role, ""] += 0
        for owner, num_bytes in owners.items():
            role, key_id = roles.get(owner, (NO_ROLE, ""))
            found[of, role, key_id if by_key else ""] += num_bytes
    return found


def metrics_route(
    config: ServerConfig,
    statistics: Mapping,
    scheduler: Scheduler,
    router: Router,
    metrics: Metrics,
    gate: Gate,
    owners: Owners,
) -> Route:
    """The route that Prometheus scrapes: numbers about the whole server, which this machine may read without a key, and
    an admin from anywhere."""

    def of_actors() -> list[Metric]:
        return [family for name, actor in statistics.items() for family in families_of(name, actor.statistics())]

    of_actors()  # their HELP lines are read from the source the first time: now, while nobody waits for the event loop

    async def answer(request: Request) -> Response:
        if not gate.is_local(request.scope):
            try:
                owners.require_admin(key_of(request.headers), reached_at(request.scope))
            except UserError as error:
                return error_response(error)
        more = families(scheduler, router, owners.roles(), config.metrics_by_key)
        scrape = Scrape([*of_actors(), *more], metrics)
        # On a thread: encoding some thousand lines would hold up the event loop.
        text, content_type = await anyio.to_thread.run_sync(scrape.encode, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return Route("/metrics", answer, methods=["GET"])
