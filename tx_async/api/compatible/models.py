"""Which weights a request's `model` names, and the list of models."""

from __future__ import annotations

from tx_async import __version__
from tx_async.api import validation
from tx_async.api.compatible.fields import ModelNotServed
from tx_async.api.context import Call
from tx_async.api.ownership import readable_checkpoint
from tx_async.errors import InvalidRequest, NotFound
from tx_async.wire import openai

PATH_PREFIX = "tinker://"
_FINGERPRINT_CHARACTERS = 12


def model_path(call: Call, name: str) -> str | None:
    """The checkpoint that a name stands for, None for the base model: `BASE`, `tinker://…` or `BASE;tinker://…`,
    optionally followed by `:peft:N`. Raises `ModelNotServed`."""
    base, path, context = _parts(name)
    model = call.scheduler.base_model
    try:
        if base or not path:
            validation.base_model(base + context, model, field="model")
        elif context:
            validation.base_model(model.name + context, model, field="model")
        return readable_checkpoint(call, path).path if path else None
    except (InvalidRequest, NotFound) as error:
        what = error.message if error.message.startswith("model ") else f"model {name[:200]!r}: {error.message}"
        raise ModelNotServed(what) from None


def _parts(name: str) -> tuple[str, str, str]:
    """(base model, checkpoint, `:peft:N`), "" for what is absent."""
    plain, marker, length = name.strip().rpartition(":peft:")
    name, context = (plain, marker + length) if marker else (length, "")
    if name.startswith(PATH_PREFIX):
        return "", name, context
    base, _, path = name.partition(";")
    return base, path, context


def fingerprint(call: Call) -> str:
    """The fingerprint of what answers: the base model's weights, and this program."""
    base = call.scheduler.base_model.fingerprint[:_FINGERPRINT_CHARACTERS] or "unknown"
    return f"fp_{base}_{__version__}"


async def list_models(call: Call) -> openai.Models:
    """The base model under each of its names, and the key's own checkpoints that can be sampled."""
    owned_by = "tx-async"
    names = call.scheduler.base_model.public_names
    found = [openai.Model(id=name, created=0, owned_by=owned_by) for name in names]
    found += [
        openai.Model(id=checkpoint.path, created=int(checkpoint.created_at), owned_by=owned_by)
        for checkpoint in call.scheduler.checkpoints.values()
        if checkpoint.owner == call.owner and checkpoint.kind == "sampler_weights"
    ]
    return openai.Models(data=found)


async def get_model(call: Call) -> openai.Model:
    name = call.path("model")
    path = model_path(call, name)
    created = readable_checkpoint(call, path).created_at if path else 0
    return openai.Model(id=name, created=int(created), owned_by="tx-async")
