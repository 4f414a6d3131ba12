"""Client set-up: flags, sessions and what the server can do."""

from __future__ import annotations

from functools import partial

from starlette.responses import Response

from tx_async.api import validation
from tx_async.api.context import Call
from tx_async.api.errors import json_response
from tx_async.health import Health
from tx_async.wire import tinker
from tx_async.wire.ids import new_id
from tx_async.wire.records import SessionRecord

DYNAMIC_CONFIG_REFRESH_S = 300


async def client_config(call: Call) -> tinker.ClientConfigResponse:
    """Compression is off: on a local network it costs the one event loop more than it saves."""
    return tinker.ClientConfigResponse(
        pjwt_auth_enabled=False,
        proto_compress_fwdbwd=False,
        parallel_fwdbwd_chunks=True,
        sample_use_retrieve_futures=False,
        custom_loss_server_side=False,
        sample_join_sampling_session=True,
        create_model_via_load_weights=True,
    )


async def client_dynamic_config(call: Call) -> tinker.ClientDynamicConfigResponse:
    return tinker.ClientDynamicConfigResponse(
        refresh_interval_sec=DYNAMIC_CONFIG_REFRESH_S, sample_cancel_enabled=True, sample_cancel_max_batch_size=64
    )


async def create_session(call: Call, request: tinker.CreateSessionRequest) -> tinker.CreateSessionResponse:
    config, text = call.api.config, partial(validation.text, bytes_max=call.api.config.text_bytes_max)
    session = SessionRecord(
        session_id=new_id("s"),
        owner=call.owner,
        created_at=call.api.clock.now(),
        tags=validation.tags(request.tags, config.tags_max, config.text_bytes_max),
        user_metadata=validation.metadata(request.user_metadata, call.api.config.user_metadata_bytes_max),
        sdk_version=text("sdk_version", request.sdk_version) or "",
        project_id=text("project_id", request.project_id),
        display_name=text("display_name", request.display_name),
    )
    await call.scheduler.create_session(session)
    return tinker.CreateSessionResponse(type="create_session", session_id=session.session_id)


async def session_heartbeat(call: Call, request: tinker.SessionHeartbeatRequest) -> tinker.SessionHeartbeatResponse:
    call.scheduler.heartbeat(call.owner, request.session_id)
    return tinker.SessionHeartbeatResponse(type="session_heartbeat")


async def finish_session(call: Call, request: tinker.FinishSessionRequest) -> tinker.Accepted:
    detail = validation.text("detail", request.detail, call.api.config.text_bytes_max)
    await call.scheduler.finish_session(call.owner, call.path("session_id"), request.reason.type, detail)
    return tinker.Accepted()


async def get_server_capabilities(call: Call) -> tinker.ServerCapabilitiesResponse:
    model = call.scheduler.base_model
    supported = tinker.SupportedModel(
        model_name=model.name, max_context_length=model.max_context_length, trainable=True, sampleable=True
    )
    return tinker.ServerCapabilitiesResponse(supported_models=[supported])


async def healthz(call: Call) -> Response:
    """503 with what is still missing before a request can run. `?live`: 200 while the server answers at all.
    `?verbose`: the findings on storage, journal, workers, disk and memory, 503 where one has a problem."""
    if "live" in call.request.query_params:
        return json_response(tinker.HealthResponse(status="ok"))
    if "verbose" in call.request.query_params and call.api.health is not None:
        return await _verbose(call, call.api.health)
    is_told_all = _is_told_all(call)
    if waiting_for := call.scheduler.waiting_for(in_full=is_told_all):
        if not is_told_all:
            waiting_for = [call.api.redact(line) for line in waiting_for]
        return json_response(tinker.HealthResponse(status="starting", waiting_for=waiting_for), 503)
    return json_response(tinker.HealthResponse(status="ok"))


async def _verbose(call: Call, health: Health) -> Response:
    is_told_all = _is_told_all(call)
    report = await health.report(in_full=is_told_all)
    tell = str if is_told_all else call.api.redact
    checks = {name: tinker.HealthCheck(state=found.state, text=tell(found.text)) for name, found in report.items()}
    waiting_for = [f"{name}: {check.text}" for name, check in checks.items() if check.state == "problem"]
    status = "problem" if waiting_for else "ok"
    answer = tinker.HealthResponse(status=status, waiting_for=waiting_for, checks=checks)
    return json_response(answer, 503 if waiting_for else 200)


def _is_told_all(call: Call) -> bool:
    """Whether whoever asks is an operator."""
    return call.api.gate.is_local(call.request.scope) or call.is_admin
