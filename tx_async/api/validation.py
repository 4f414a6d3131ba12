"""Checks whether a request makes sense for this base model. Its functions are pure: an operation goes in; out comes the
same operation with its defaults filled in, or an `InvalidRequest` that names what to change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from tx_async.errors import InvalidRequest
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.wire.operations import (
    SUPPORT_TOKENS_MAX,
    Datum,
    ForwardBackward,
    Provenance,
    ProvenanceSpan,
    Sample,
    is_shaped,
)
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import CLIP_THRESHOLDS, INT32_MAX, LOGIT_BIAS_MAX, AdamParams, AdapterConfig

TTL_SECONDS_MIN = 3600
TTL_SECONDS_MAX = 10 * 365 * 24 * 3600
STOPS_MAX = 256
STOP_STRING_CHARACTERS_MAX = 1024

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,127}")
_KINDS = ("weights", "sampler_weights", "external_weights")


# ---- losses


class LossSpec(Struct, frozen=True):
    """The inputs that a loss takes besides target_tokens."""

    inputs: dict[str, float | None]
    """Each input with its default; None: required."""
    config: dict[str, float | None] = {}
    """Likewise."""
    optional: frozenset[str] = frozenset()
    """Inputs that may be absent, and then stay so."""


_POLICY: dict[str, float | None] = {"logprobs": None, "advantages": None}
_CLIPS = frozenset({"clip_low_threshold", "clip_high_threshold"})


def _thresholds(loss: str) -> dict[str, float | None]:
    return dict(zip(("clip_low_threshold", "clip_high_threshold"), CLIP_THRESHOLDS[loss], strict=True))


LOSSES: dict[str, LossSpec] = {
    "cross_entropy": LossSpec({"weights": 1.0}),
    "importance_sampling": LossSpec(_POLICY),
    "ppo": LossSpec(_POLICY, _thresholds("ppo"), _CLIPS),
    "cispo": LossSpec(_POLICY, _thresholds("cispo"), _CLIPS),
    "dro": LossSpec(_POLICY, {"beta": None}),
    "gspo": LossSpec(_POLICY, _thresholds("gspo"), _CLIPS | {"sequence_ratio_mask"}),
    "stable_reinforce": LossSpec({"advantages": None}, {"kl_coeff": 0.0}, frozenset({"logprobs"})),
}


def forward_backward(operation: ForwardBackward, model: BaseModelInfo) -> ForwardBackward:
    """Completed: config values and weights are present, float inputs are float32, shapes fit, tokens are known."""
    loss = LOSSES.get(operation.loss_fn)
    if loss is None:
        raise InvalidRequest(f"loss_fn {operation.loss_fn!r} is unknown here; known: {', '.join(LOSSES)}.")
    if not operation.data:
        raise InvalidRequest("data is empty: send at least one datum.")
    config = _loss_fn_config(operation, loss)
    data = _each(operation.data, lambda datum: _datum(datum, operation.loss_fn, loss, model))
    try:
        _check_values(data, model)
    except InvalidRequest:
        _each(data, lambda datum: _check_values((datum,), model))  # names the datum
        raise
    return msgspec.structs.replace(operation, data=data, loss_fn_config=config)


def _each(data: Sequence[Datum], function: Callable[[Datum], T]) -> tuple[T, ...]:
    results: list[T] = []
    for index, datum in enumerate(data):
        try:
            results.append(function(datum))
        except InvalidRequest as error:
            raise InvalidRequest(f"data[{index}]: {error.message}") from None
    return tuple(results)


def _loss_fn_config(operation: ForwardBackward, loss: LossSpec) -> dict[str, float]:
    given = operation.loss_fn_config
    if unknown := sorted(set(given) - set(loss.config)):
        known = ", ".join(loss.config) or "none"
        raise InvalidRequest(f"loss_fn_config: {operation.loss_fn} takes no {', '.join(unknown)}; known: {known}.")
    config = {key: given.get(key, default) for key, default in loss.config.items()}
    complete = {key: value for key, value in config.items() if value is not None}
    if missing := sorted(set(config) - set(complete)):
        raise InvalidRequest(f"loss_fn_config: {operation.loss_fn} needs {', '.join(missing)}.")
    for key, value in complete.items():
        if math.isnan(value) or (math.isinf(value) and key not in _CLIPS):
            raise InvalidRequest(f"loss_fn_config: {key} is {value}; it must be a finite number.")
    _check_clips(complete)
    return complete


def _check_clips(config: Mapping[str, float]) -> None:
    if config.keys() >= _CLIPS and config["clip_low_threshold"] > config["clip_high_threshold"]:
        raise InvalidRequest("loss_fn_config: clip_low_threshold is above clip_high_threshold.")


def _datum(datum: Datum, loss_fn: str, loss: LossSpec, model: BaseModelInfo) -> Datum:
    """The datum with its defaults. Names and shapes are checked; values are not yet."""
    if not datum.num_tokens:
        raise InvalidRequest("model_input is empty.")
    if datum.num_tokens > model.max_context_length:
        raise InvalidRequest(
            f"model_input has {datum.num_tokens} tokens; the context of {model.name} is {model.max_context_length}."
        )
    given = datum.loss_fn_inputs
    known = loss.inputs.keys() | loss.optional
    if unknown := sorted(given.keys() - known - {"target_tokens"}):
        listed = ", ".join(sorted({"target_tokens", *known}))
        raise InvalidRequest(f"loss_fn_inputs: {loss_fn} takes no {', '.join(unknown)}; known: {listed}.")
    if missing := [
        name for name in ("target_tokens", *loss.inputs) if name not in given and loss.inputs.get(name) is None
    ]:
        raise InvalidRequest(f"loss_fn_inputs: {loss_fn} needs {', '.join(missing)}.")
    targets = given["target_tokens"]
    _check_targets(targets, datum.num_tokens, loss_fn, model)
    inputs = {"target_tokens": targets}
    for name in sorted(known):
        if name in given:
            inputs[name] = _float_input(name, given[name], targets.shape)
        elif name in loss.inputs:
            inputs[name] = Tensor.of(np.full(targets.shape, loss.inputs[name], np.float32))
    _check_provenance(datum, inputs, loss_fn)
    return Datum(datum.tokens, inputs, datum.provenance)


def _check_provenance(datum: Datum, inputs: Mapping[str, Tensor], loss_fn: str) -> None:
    """Checked for every loss. Whether the sequences exist and have the same tokens is for live state to tell."""
    if datum.provenance is None:
        if loss_fn == "stable_reinforce":
            raise InvalidRequest(
                "stable_reinforce needs provenance spans: make the datum with Datum.with_provenance, from sequences "
                "that were sampled with record_stability_info."
            )
        return
    _check_tiling(datum.provenance.model_input, "model_input_spans", datum.num_tokens)
    _check_tiling(datum.provenance.loss_fn_inputs, "loss_fn_input_spans", inputs["target_tokens"].shape[0])
    if loss_fn == "stable_reinforce":
        _check_advantages(inputs["advantages"].numpy(), datum.provenance)


def _check_tiling(spans: Sequence[ProvenanceSpan], name: str, num_positions: int) -> None:
    for i, span in enumerate(spans):
        if not span.sequence_id or not 0 <= span.offset <= INT32_MAX or not 0 <= span.length <= INT32_MAX:
            raise InvalidRequest(f"{name}[{i}] must name a sequence and have an offset and a length of at least 0.")
    if (total := sum(span.length for span in spans)) != num_positions:
        raise InvalidRequest(f"{name} cover {total} positions of {num_positions}: together they must cover each once.")


def _check_advantages(advantages: np.ndarray, provenance: Provenance) -> None:
    position = 0
    for i, span in enumerate(provenance.loss_fn_inputs):
        if not span.is_sampled and np.any(advantages[position : position + span.length]):
            raise InvalidRequest(
                f"advantages are not 0 within loss_fn_input_spans[{i}], whose tokens are of a prompt: "
                "stable_reinforce trains sampled tokens only."
            )
        position += span.length


def _check_targets(targets: Tensor, num_tokens: int, loss_fn: str, model: BaseModelInfo) -> None:
    if targets.dtype != "int64":
        raise InvalidRequest(f"target_tokens must be int64, not {targets.dtype}.")
    if targets.shape[0] != num_tokens:
        raise InvalidRequest(f"model_input has {num_tokens} tokens, target_tokens {targets.shape[0]}: make them equal.")
    if len(targets.shape) == 2:
        if loss_fn != "cross_entropy":
            raise InvalidRequest(f"{loss_fn} needs target_tokens of one dimension; only cross_entropy takes [N, K].")
        if not 1 <= targets.shape[1] <= model.target_tokens_k_max:
            raise InvalidRequest(
                f"target_tokens has {targets.shape[1]} targets per token; allowed are 1 to {model.target_tokens_k_max}."
            )


def _float_input(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape != shape:
        raise InvalidRequest(
            f"{name} has the shape {list(tensor.shape)}, target_tokens {list(shape)}: make them equal."
        )
    return tensor if tensor.dtype == "float32" else Tensor.of(tensor.numpy().astype(np.float32))


def _check_values(data: Sequence[Datum], model: BaseModelInfo) -> None:
    """Checks all datums in one call: one for each of a thousand small arrays would cost a thousand times that."""
    _check_tokens(np.frombuffer(b"".join([datum.tokens for datum in data]), "<i4"), "model_input", model)
    for name in sorted({name for datum in data for name in datum.loss_fn_inputs}):
        tensors = [datum.loss_fn_inputs[name] for datum in data if name in datum.loss_fn_inputs]
        content = b"".join([tensor.data for tensor in tensors])
        if name == "target_tokens":
            _check_tokens(np.frombuffer(content, "<i8"), name, model)
        else:
            _check_finite(np.frombuffer(content, "<f4"), name)


def _check_finite(values: np.ndarray, name: str) -> None:
    """Clip thresholds may be infinite, which means no bound."""
    if not np.isfinite(values).all() and (name not in _CLIPS or np.isnan(values).any()):
        raise InvalidRequest(f"{name} has values that are NaN or infinite.")


def _check_tokens(tokens: np.ndarray, what: str, model: BaseModelInfo) -> None:
    if not tokens.size:
        raise InvalidRequest(f"{what} is empty.")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= model.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequest(
            f"{what} has the token {wrong}; the vocabulary of {model.name} is 0 to {model.vocab_size - 1}."
        )


# ---- optimizer, adapters


def adam_params(params: AdamParams) -> AdamParams:
    for field in ("learning_rate", "eps", "grad_clip_norm", "weight_decay"):
        value = getattr(params, field)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"adam_params: {field} is {value}; it must be finite and not negative.")
    for field in ("beta1", "beta2"):
        if not 0 <= getattr(params, field) < 1:
            raise InvalidRequest(f"adam_params: {field} is {getattr(params, field)}; it must lie in [0, 1).")
    return params


def adapter(config: AdapterConfig, model: BaseModelInfo) -> AdapterConfig:
    if not 1 <= config.rank <= model.max_lora_rank:
        raise InvalidRequest(
            f"lora_config: rank is {config.rank}; this server allows 1 to {model.max_lora_rank} (its setting "
            "max_lora_rank in backend_config)."
        )
    if not (config.train_attn or config.train_mlp or config.train_unembed):
        raise InvalidRequest("lora_config: train_attn, train_mlp and train_unembed are all false: nothing would train.")
    return config


def base_model(name: str, model: BaseModelInfo, field: str = "base_model") -> str:
    """The name under which the model is reported, whichever of its names this is. `NAME:peft:N` is the hosted service's
    way to ask for a context of N tokens."""
    known, (plain, marker, length) = {model.name, *model.aliases}, name.strip().rpartition(":peft:")
    if (plain if marker else length).rstrip("/") not in known:
        served = " or ".join(map(repr, model.public_names))
        raise InvalidRequest(f"{field} {name[:200]!r} is not served here; this server has {served}.")
    if marker and not (length.isascii() and length.isdigit() and 0 < int(length[:12]) <= model.max_context_length):
        context = model.max_context_length
        raise InvalidRequest(f"{field} {name[:200]!r} asks for {length[:12]!r} tokens; the context is {context}.")
    return model.name


def optimizer_type(kind: str) -> None:
    if kind != "adamw":
        raise InvalidRequest(f"The optimizer {kind!r} is not supported here; use adamw.")


def seed(value: int | None) -> int | None:
    """Any 64-bit number, signed or not, folded into [0, 2^63)."""
    if value is None:
        return None
    if not -(2**63) <= value < 2**64:
        raise InvalidRequest(f"seed is {value}; it must fit 64 bits.")
    return value & (2**63 - 1)


# ---- checkpoints, sessions


def checkpoint_name(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"The checkpoint name {name[:200]!r} is not allowed: use 1 to 128 letters, digits and . _ + = @ - "
            "(no leading dot, no two dots in a row, no slash)."
        )
    return name


def ttl_seconds(value: int | None) -> int | None:
    if value is not None and not TTL_SECONDS_MIN <= value <= TTL_SECONDS_MAX:
        raise InvalidRequest(f"ttl_seconds is {value}; allowed are {TTL_SECONDS_MIN} to {TTL_SECONDS_MAX}, or null.")
    return value


def tinker_path(path: str) -> str:
    """`tinker://<run>/<kind>/<name>`, as the SDK parses it."""
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in _KINDS or not (parts[0] and parts[2]):
        raise InvalidRequest(
            f"{path[:200]!r} is not a checkpoint path: that is tinker://<training run>/<{'|'.join(_KINDS)}>/<name>."
        )
    return path


def metadata(value: dict[str, Any] | None, bytes_max: int) -> dict[str, Any]:
    """Metadata may be anything that can be stored and given back."""
    try:
        size = len(msgspec.msgpack.encode(value or {}))
    except (OverflowError, UnicodeError, RecursionError):
        raise InvalidRequest(
            "user_metadata holds a number beyond 64 bits, or text that is not valid Unicode."
        ) from None
    if size > bytes_max:
        raise InvalidRequest(f"user_metadata takes {size} bytes; allowed are {bytes_max} (`user_metadata_bytes_max`).")
    return value or {}


def text(field: str, value: str | None, bytes_max: int) -> str | None:
    """Text that is kept as it is and shown again."""
    size = len((value or "").encode("utf-8", "surrogatepass"))
    if size > bytes_max:
        raise InvalidRequest(f"{field} takes {size} bytes; allowed are {bytes_max} (`text_bytes_max`).")
    return value


def tags(values: list[str] | None, tags_max: int, bytes_max: int) -> tuple[str, ...]:
    if len(values or ()) > tags_max:
        raise InvalidRequest(f"tags has {len(values or ())} entries; allowed are {tags_max} (`tags_max`).")
    for value in values or ():
        text("tags", value, bytes_max)
    return tuple(values or ())


# ---- sampling


def sample(
    operation: Sample, model: BaseModelInfo, num_samples_max: int, support_max: int = SUPPORT_TOKENS_MAX
) -> Sample:
    prompt = np.frombuffer(operation.prompt, "<i4")
    _check_tokens(prompt, "prompt", model)
    # A prompt that fills the context can be scored, although nothing can be sampled after it.
    if len(prompt) + (not operation.scores_prompt) > model.max_context_length:
        raise InvalidRequest(
            f"prompt has {len(prompt)} tokens; the context, completion included, is {model.max_context_length}."
        )
    _check_range("num_samples", operation.num_samples, 1, num_samples_max)
    _check_sampling_params(operation, model)
    _check_stops(operation, model)
    for field in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        _check_range(field, getattr(operation, field), 0, min(model.target_tokens_k_max, model.vocab_size))
    if operation.record_stability_info and operation.top_p == 1 and support_max < operation.top_k < model.vocab_size:
        raise InvalidRequest(
            f"top_k is {operation.top_k}; with record_stability_info it may leave at most {support_max} tokens "
            "(`stability_support_max`): use a smaller one, or -1 for no limit."
        )
    if operation.prompt_logprobs_last_n:
        if not operation.prompt_logprobs:
            raise InvalidRequest("prompt_logprobs_last_n needs prompt_logprobs.")
        _check_range("prompt_logprobs_last_n", operation.prompt_logprobs_last_n, 1, len(prompt) - 1)
    if operation.target_prompt_logprobs is not None:
        _check_prompt_targets(operation.target_prompt_logprobs, len(prompt), model)
    return operation


def _check_sampling_params(operation: Sample, model: BaseModelInfo) -> None:
    # Beyond the rest of the context it only takes effect earlier; beyond the whole context it is a mistake.
    if operation.max_tokens is not None and not 1 <= operation.max_tokens <= model.max_context_length:
        raise InvalidRequest(
            f"max_tokens is {operation.max_tokens}; it must be 1 to {model.max_context_length}, the context of "
            f"{model.name}, or absent for as many as fit."
        )
    if not (math.isfinite(operation.temperature) and operation.temperature >= 0):
        raise InvalidRequest(f"temperature is {operation.temperature}; it must be finite and not negative.")
    if not 0 < operation.top_p <= 1:
        raise InvalidRequest(f"top_p is {operation.top_p}; it must lie in (0, 1].")
    if operation.top_k != -1 and operation.top_k < 1:
        raise InvalidRequest(f"top_k is {operation.top_k}; it must be at least 1, or -1 for no limit.")
    if not 0 <= operation.min_p <= 1:
        raise InvalidRequest(f"min_p is {operation.min_p}; it must lie in [0, 1].")
    _check_shaping(operation, model)


def _check_shaping(operation: Sample, model: BaseModelInfo) -> None:
    """Checks penalties and biases: what changes the logits that tokens are drawn from."""
    for field in ("presence_penalty", "frequency_penalty"):
        if not -2 <= (value := getattr(operation, field)) <= 2:
            raise InvalidRequest(f"{field} is {value}; it must lie in [-2, 2].")
    if not (math.isfinite(operation.repetition_penalty) and operation.repetition_penalty > 0):
        raise InvalidRequest(f"repetition_penalty is {operation.repetition_penalty}; it must be finite and above 0.")
    _check_range("min_tokens", operation.min_tokens, 0, operation.max_tokens or model.max_context_length)
    biased = [token for token, _ in operation.logit_bias]
    if len(biased) > LOGIT_BIAS_MAX or len(set(biased)) < len(biased):
        raise InvalidRequest(f"logit_bias has {len(biased)} entries; it takes {LOGIT_BIAS_MAX}, each token once.")
    for token, bias in operation.logit_bias:
        if not 0 <= token < model.vocab_size:
            raise InvalidRequest(
                f"logit_bias has the token {token}; the vocabulary of {model.name} is 0 to {model.vocab_size - 1}."
            )
        if not -100 <= bias <= 100:
            raise InvalidRequest(f"logit_bias of token {token} is {bias}; it must lie in [-100, 100].")
    if operation.record_stability_info and is_shaped(operation):
        raise InvalidRequest("record_stability_info goes with no min_p, penalties, logit_bias or min_tokens.")


def _check_stops(operation: Sample, model: BaseModelInfo) -> None:
    if len(operation.stop_strings) + len(operation.stop_token_ids) > STOPS_MAX:
        raise InvalidRequest(f"stop has more than {STOPS_MAX} entries.")
    if operation.stop_strings and model.tokenizer_problem:
        raise InvalidRequest(
            "stop has strings, and this server cannot find them: its base model has no tokenizer that can be loaded "
            "(its log says why). Use token ids."
        )
    for text in operation.stop_strings:
        if not 1 <= len(text) <= STOP_STRING_CHARACTERS_MAX:
            raise InvalidRequest(f"stop has {len(text)} characters; allowed are 1 to {STOP_STRING_CHARACTERS_MAX}.")
    for token in operation.stop_token_ids:
        if not 0 <= token < model.vocab_size:
            raise InvalidRequest(
                f"stop has the token {token}; the vocabulary of {model.name} is 0 to {model.vocab_size - 1}."
            )


def _check_prompt_targets(targets: Tensor, num_tokens: int, model: BaseModelInfo) -> None:
    if len(targets.shape) != 2 or targets.shape[0] != num_tokens - 1:
        raise InvalidRequest(
            f"target_prompt_logprobs has the shape {list(targets.shape)}; this prompt needs [{num_tokens - 1}, K]."
        )
    _check_range("target_prompt_logprobs: K", targets.shape[1], 1, model.target_tokens_k_max)
    cells = targets.numpy()
    if cells.size and not (cells.min() >= -1 and cells.max() < model.vocab_size):
        raise InvalidRequest(
            f"target_prompt_logprobs has tokens outside 0 to {model.vocab_size - 1} (and -1 for none)."
        )


def _check_range(field: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise InvalidRequest(f"{field} is {value}; allowed are {lowest} to {highest}.")
