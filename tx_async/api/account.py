"""Keys and bills: what a self-hosted server can say about them without inventing anything."""

from __future__ import annotations

from collections import Counter

from tx_async.api.context import Call
from tx_async.wire import tinker

BYTES_PER_GIGABYTE = 10**9


async def describe_api_key(call: Call) -> tinker.ApiKeyResponse:
    key = call.api.owners.find(call.key)
    return tinker.ApiKeyResponse(
        key_id=int(call.owner.removeprefix("owner-")[:8], 16),
        name=key.name if key else "",
        note="A key of this server.",
        details=tinker.ApiKeyDetails(
            org_details=tinker.ApiKeyOrganisation(name="tx_async"), user_details=tinker.ApiKeyUser(email="")
        ),
    )


async def billing_usage(call: Call) -> tinker.BillingUsageResponse:
    return tinker.BillingUsageResponse(data=[], sessions={})


async def checkpoint_storage_usage(call: Call) -> tinker.CheckpointStorageUsageResponse:
    """The bytes of the caller's own checkpoints, by project."""
    counts, sizes = Counter[str | None](), Counter[str | None]()
    for checkpoint in call.scheduler.checkpoints.values():
        if checkpoint.owner == call.owner:
            model = call.scheduler.models.get(checkpoint.model_id)
            session = call.scheduler.sessions.get(model.session_id) if model else None
            project_id = session.project_id if session else None
            counts[project_id] += 1
            sizes[project_id] += checkpoint.size_bytes
    wanted = call.query("project_id")
    return tinker.CheckpointStorageUsageResponse(
        data=[
            tinker.CheckpointStorageUsage(
                checkpoint_count=count,
                size_bytes=sizes[project_id],
                size_gigabytes=sizes[project_id] / BYTES_PER_GIGABYTE,
                project_id=project_id,
            )
            for project_id, count in counts.items()
            if not wanted or wanted == project_id
        ]
    )
