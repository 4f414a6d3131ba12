"""Every route of the server, in one table. The hot ones come first, because the router searches from the top."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from tx_async.api import (
    account,
    audit,
    downloads,
    futures,
    history,
    imports,
    models,
    rest,
    sampling,
    service,
    sessions,
    telemetry,
    traces,
    training,
    weights,
)
from tx_async.api.budget import Bodies
from tx_async.api.compatible import cors
from tx_async.api.compatible import rows as compatible
from tx_async.api.compatible.grammar_check import GrammarCheck
from tx_async.api.compatible.tokenizer import TokenizerLoader
from tx_async.api.context import Api, CheckpointFiles
from tx_async.api.endpoint import Endpoint, Row
from tx_async.api.errors import http_exception_response
from tx_async.api.gate import Gate
from tx_async.api.links import Links
from tx_async.api.owner import Owners, open_owners
from tx_async.api.redaction import Redaction
from tx_async.clock import Clock, SystemClock
from tx_async.config import ServerConfig
from tx_async.dashboard import views as dashboard
from tx_async.dashboard.news import News
from tx_async.dashboard.pages import is_on, page_routes
from tx_async.dashboard.rates import Rates
from tx_async.dashboard.viewer import Tokens
from tx_async.health import Health
from tx_async.names import tokenizer_id
from tx_async.scheduler.interface import SchedulerApi
from tx_async.wire import tinker

_CHECKPOINT = "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"

ROUTES = (
    Row("POST", "/api/v1/retrieve_future", futures.retrieve_future, "Wait for the result of a request"),
    Row(
        "POST",
        "/api/v1/forward_backward",
        training.forward_backward,
        "Compute a loss, and its gradients unless forward_only",
        request="ForwardBackwardRequest of tinker.proto (zstd allowed), or JSON from SDKs before 0.25",
    ),
    Row(
        "POST",
        "/api/v1/optim_step",
        training.optim_step,
        "Apply the accumulated gradients",
        request=tinker.OptimStepRequest,
    ),
    Row("POST", "/api/v1/asample", sampling.asample, "Sample from a sampling session", request=tinker.SampleRequest),
    Row("POST", "/api/v1/session_heartbeat", service.session_heartbeat, "Keep a session alive"),
    Row(
        "POST", "/api/v1/forward", training.forward, "Compute a loss (SDKs before 0.25)", request=tinker.ForwardRequest
    ),
    # service
    Row("GET", "/api/v1/healthz", service.healthz, "Whether a request could run, and what is missing", public=True),
    Row("POST", "/api/v1/client/config", service.client_config, "Flags for the SDK"),
    Row("POST", "/api/v1/client/dynamic_config", service.client_dynamic_config, "Flags that the SDK asks for again"),
    Row("POST", "/api/v1/create_session", service.create_session, "Begin a session"),
    Row("POST", "/api/v1/sessions/{session_id}/finish", service.finish_session, "End a session"),
    Row("GET", "/api/v1/get_server_capabilities", service.get_server_capabilities, "The models served here"),
    Row("POST", "/api/v1/telemetry", telemetry.telemetry, "Accept and forget the SDK's telemetry"),
    # models
    Row("POST", "/api/v1/create_model", models.create_model, "Create a LoRA adapter to train"),
    Row("POST", "/api/v1/get_info", models.get_info, "Describe a model"),
    Row("POST", "/api/v1/unload_model", models.unload_model, "Unload a model (SDKs up to 0.25)"),
    # weights
    Row(
        "POST",
        "/api/v1/save_weights",
        weights.save_weights,
        "Save a training checkpoint",
        request=tinker.SaveWeightsRequest,
    ),
    Row(
        "POST",
        "/api/v1/save_weights_for_sampler",
        weights.save_weights_for_sampler,
        "Save weights to sample from",
        request=tinker.SaveWeightsForSamplerRequest,
    ),
    Row(
        "POST",
        "/api/v1/save_weights_external",
        weights.save_weights_external,
        "Export a PEFT adapter",
        request=tinker.SaveWeightsExternalRequest,
    ),
    Row(
        "POST",
        "/api/v1/load_weights",
        weights.load_weights,
        "Load a checkpoint into a new or a live model",
        request=tinker.LoadWeightsRequest,
    ),
    Row("POST", "/api/v1/weights_info", weights.weights_info, "Describe a checkpoint's adapter"),
    Row("POST", "/api/v1/copy_weights", weights.copy_weights, "Copy a checkpoint into a new run"),
    Row(
        "POST",
        "/api/v1/import_adapter",
        imports.import_adapter,
        "Make a checkpoint of a PEFT adapter (`tx-async import`)",
        request="A tar of adapter_config.json and adapter_model.safetensors; the query's `name` names the checkpoint",
    ),
    # sampling
    Row("POST", "/api/v1/create_sampling_session", sampling.create_sampling_session, "Begin to sample some weights"),
    Row("POST", "/api/v1/join_sampling_session", sampling.join_sampling_session, "A number for one more client"),
    Row("GET", "/api/v1/samplers/{sampler_id}", sampling.get_sampler, "Describe a sampling session"),
    Row("POST", "/api/v1/cancel_future", futures.cancel_future, "Stop a sample that nobody waits for"),
    # rest
    Row("GET", "/api/v1/training_runs", rest.list_training_runs, "List training runs"),
    Row("GET", "/api/v1/training_runs/{run}", rest.get_training_run, "Describe a training run"),
    Row(
        "GET",
        "/api/v1/training_runs/{run}/history",
        history.get_training_run_history,
        "What a run's optimizer steps have reported, as JSON or CSV",
        media_types=("text/csv",),
    ),
    Row("GET", "/api/v1/training_runs/{run}/checkpoints", rest.list_checkpoints, "List a run's checkpoints"),
    Row("GET", "/api/v1/checkpoints", rest.list_user_checkpoints, "List all one's checkpoints"),
    Row("DELETE", _CHECKPOINT, rest.delete_checkpoint, "Delete a checkpoint"),
    Row("POST", f"{_CHECKPOINT}/publish", rest.publish_checkpoint, "Let everyone read a checkpoint"),
    Row("DELETE", f"{_CHECKPOINT}/publish", rest.unpublish_checkpoint, "Let only its owner read a checkpoint"),
    Row("PUT", f"{_CHECKPOINT}/ttl", rest.set_checkpoint_ttl, "Set or clear a checkpoint's time to live"),
    Row(
        "GET",
        f"{_CHECKPOINT}/external_weights_urls",
        downloads.external_weights_urls,
        "Links to a checkpoint's files",
    ),
    Row("GET", f"{_CHECKPOINT}/archive", downloads.archive_url, "Redirect to a checkpoint's tar (SDKs up to 0.25)"),
    Row(
        "GET",
        "/api/v1/external_weights/{token}/{file:path}",
        downloads.external_weights_file,
        "One file of a checkpoint, by link",
        public=True,
    ),
    Row("GET", "/api/v1/archives/{token}", downloads.archive, "A checkpoint as tar, by link", public=True),
    Row("GET", "/api/v1/sessions", sessions.list_sessions, "List sessions"),
    Row("POST", "/api/v1/sessions/search", sessions.search_sessions, "Search sessions"),
    Row("GET", "/api/v1/sessions/{session_id}", sessions.get_session, "Describe a session"),
    Row("PUT", "/api/v1/sessions/{session_id}/project", sessions.assign_session_project, "Move a session to a project"),
    Row("GET", "/api/v1/sessions/{session_id}/trace_export", traces.export_session_trace, "Export a session's trace"),
    Row("GET", "/api/v1/traces/{token}", traces.session_trace, "A session's trace, by link", public=True),
    # account
    Row("GET", "/api/v1/auth/apikey/me", account.describe_api_key, "Describe the API key"),
    Row("GET", "/api/v1/audit", audit.audit_log, "Who did what to which run, checkpoint or key"),
    Row("GET", "/api/v1/billing/usage/events", account.billing_usage, "Billed usage (none here)"),
    Row(
        "GET",
        "/api/v1/billing/usage/checkpoints/current",
        account.checkpoint_storage_usage,
        "Bytes that checkpoints take",
    ),
    *compatible.ROWS,
    # the page
    *dashboard.ROWS,
)


def create_routes(
    scheduler: SchedulerApi,
    config: ServerConfig,
    files: CheckpointFiles,
    *,
    clock: Clock | None = None,
    links: Links | None = None,
    owners: Owners | None = None,
    health: Health | None = None,
    rates: Rates | None = None,
) -> list[Route]:
    """Everything that is served. Raises `ConfigError` when the key registry cannot be read."""
    clock, owners = clock or SystemClock(), owners or open_owners(config)
    redact = Redaction(
        config, scheduler.base_model.name, lambda: {model.base_model for model in scheduler.models.values()}
    )
    api = Api(
        scheduler=scheduler,
        config=config,
        clock=clock,
        files=files,
        owners=owners,
        links=links or Links(),
        health=health,
        gate=Gate(config),
        redact=redact,
        tokenizer_id=tokenizer_id(
            config.tokenizer, config.base_model, config.base_model_name, scheduler.base_model.path
        )
        or scheduler.base_model.name,
        bodies=Bodies(config),
        tokenizer=TokenizerLoader(scheduler.base_model.path),
        grammars=GrammarCheck(scheduler.base_model.path),
        news=News(scheduler, clock, owners.names, redact, rates),
        tokens=Tokens(),
    )
    rows = [row for row in ROUTES if row not in dashboard.ROWS or is_on(config)]
    return [_route(row, api) for row in rows] + (page_routes(bool(config.api_keys_file)) if is_on(config) else [])


def _route(row: Row, api: Api) -> Route:
    endpoint = Endpoint(row, api)
    if row in compatible.ROWS and api.config.cors_origins:
        return Route(row.path, cors.open_to(endpoint, api.config.cors_origins), methods=[row.method, "OPTIONS"])
    return Route(row.path, endpoint, methods=[row.method])


def create_api(
    scheduler: SchedulerApi, config: ServerConfig, files: CheckpointFiles, *, clock: Clock | None = None
) -> Starlette:
    """The API alone as an application, which tests serve. Other routes answer 404, other methods 405, both in JSON."""
    routes = create_routes(scheduler, config, files, clock=clock)
    app = Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS)
    app.router.redirect_slashes = False
    return app


EXCEPTION_HANDLERS = {HTTPException: http_exception_response}
