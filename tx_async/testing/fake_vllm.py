"""vLLM as its HTTP clients see it, without vLLM: a small server on a thread, on a free port of loopback.

What it answers was recorded from vLLM 0.32 (`vllm_answers.json`); names, tokens and numbers are put in their places.
Its model is the fake engine's, so it samples what that engine samples, from adapters of the same files. A test makes it
fail: it hangs, dies, answers 500, forgets an adapter, or comes back with another model.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tx_async.testing.fake_engine import FakeEngine
from tx_async.testing.server import free_port
from tx_async.wire.worker import BASE_SLOT, SequenceSpec

ANSWERS: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_answers.json").read_text())
STOP_STRINGS_MAX = 4
Answer = tuple[int, Any]
FAILED: Answer = (500, {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError"}})


@dataclass
class FakeVllm:
    """Attributes may be changed while it runs."""

    model: str
    """Folder of the base model: its root, and its name unless `name` says otherwise."""
    vocab_size: int = 320
    name: str = ""
    max_model_len: int = 2048
    max_logprobs: int = 64
    max_lora_rank: int = 8
    api_key: str = ""
    version: str = "0.32.0"
    token_s: float = 0.0
    """Time that each token takes."""
    tells_times: bool = False
    """As with --enable-per-request-metrics."""
    drops: tuple[str, ...] = ()
    """Parts of tensors' names: what it leaves out of adapters, silently."""
    failing: tuple[str, ...] = ()
    """Paths that answer 500; "" is every path."""
    is_hanging: bool = False
    """Nothing is answered, connections stay open."""
    off_by: float = 0.0
    """Added to every log-probability, as by another model."""
    poison: int = -1
    """A token: prompts that hold it are answered with `poisoned`."""
    poisoned: Answer = FAILED
    broken_stream: bool = False
    """Streams end with an error before their last token."""
    allows_loading: bool = True
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        #: name -> folder of what is loaded
        self.adapters: dict[str, str] = {}
        #: loads and unloads since it was made: (path, name)
        self.log: list[tuple[str, str]] = []
        self.num_completions = 0
        #: completions that are being computed
        self.num_running = 0
        self.most_running = 0
        self._engine = FakeEngine(vocab_size=self.vocab_size, context=1 << 20)
        self._slots: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-vllm", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_listening(self) -> bool:
        return self._server is not None

    # ---- its life

    def __enter__(self) -> FakeVllm:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self, **changes: Any) -> None:
        """Listen (again), with nothing loaded. `changes` are attributes: another model, for example."""
        for attribute, value in changes.items():
            setattr(self, attribute, value)
        self.adapters, self.is_hanging = {}, False
        self._do(self._start())

    def die(self) -> None:
        """As kill -9: the port is closed, and every connection is cut."""
        self._do(self._die())

    def forget(self) -> None:
        """Lose the adapters, as after a restart that nobody has seen."""
        self.adapters = {}

    def _do(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def _die(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        connections = dict(self._connections)
        for task, writer in connections.items():
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*connections, return_exceptions=True)

    # ---- HTTP

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """At once, before the task has begun: nobody else would close the connection of one that never begins."""
        if not self._server:
            writer.transport.abort()  # it was accepted while the server died
            return
        task = self._loop.create_task(self._serve(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _read_request(reader):
                await self._answer(*request, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes,
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        while self.is_hanging:  # noqa: ASYNC110 - a test ends it, on another thread
            await asyncio.sleep(0.02)
        answering = asyncio.ensure_future(self._respond(method, path, headers, body, writer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ConnectionResetError  # the client has closed its connection: what it asked for ends
        finally:
            unfinished: list[asyncio.Task[Any]] = [task for task in (answering, gone) if not task.done()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        if (answer := answering.result()) is None:
            return
        status, content = answer
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        head = f"HTTP/1.1 {status} Recorded\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()

    async def _respond(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> Answer | None:
        """None: the answer is written already."""
        if any(path.startswith(failing) for failing in self.failing):
            return FAILED
        if self.api_key and path.startswith("/v1") and headers.get("authorization") != f"Bearer {self.api_key}":
            return 401, {"error": "Unauthorized"}
        match method, path:
            case "GET", "/health":
                return 200, ""
            case "GET", "/version":
                return 200, {"version": self.version}
            case "GET", "/v1/models":
                return 200, self._models()
            case "GET", "/metrics":
                return 200, f'vllm:generation_tokens_total{{engine="0"}} {float(self.num_completions)}\n'
            case "POST", "/v1/completions":
                return await self._complete(json.loads(body), writer)
            case "POST", "/v1/load_lora_adapter" if self.allows_loading:
                return self._load(**json.loads(body))
            case "POST", "/v1/unload_lora_adapter" if self.allows_loading:
                return self._unload(json.loads(body)["lora_name"])
        return recorded("no_route")

    # ---- models and adapters

    def _models(self) -> Any:
        base, adapter = copy.deepcopy(ANSWERS["models"]["body"]["data"])
        name = self.name or self.model
        cards = [base | {"id": name, "root": self.model, "max_model_len": self.max_model_len}]
        cards += [adapter | {"id": lora, "root": path, "parent": name} for lora, path in self.adapters.items()]
        return {"object": "list", "data": cards}

    def _load(self, lora_name: str, lora_path: str) -> Answer:
        if lora_name in self.adapters:
            return recorded("loaded_before", one=lora_name)
        folder = Path(lora_path)
        if not (folder / "adapter_config.json").exists():
            return recorded("no_adapter", **{"lora a": f"lora {lora_name}", "/nonexistent": lora_path})
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return recorded("rank", **{"rank 16": f"rank {rank}", "rank 8": f"rank {self.max_lora_rank}"})
        slot = self._slots.setdefault(lora_name, len(self._slots))
        self._engine.load_peft(slot, (folder / "adapter_model.safetensors").read_bytes(), without=self.drops)
        self.adapters[lora_name] = lora_path
        self.log.append(("load", lora_name))
        return recorded("loaded", one=lora_name)

    def _unload(self, name: str) -> Answer:
        if name not in self.adapters:
            return recorded("not_loaded", **{"'a'": f"'{name}'"})
        del self.adapters[name]
        self.log.append(("unload", name))
        return recorded("unloaded", one=name)

    # ---- completions

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> Answer | None:
        base, model = self.name or self.model, body["model"]
        if model != base and model not in self.adapters:
            return recorded("unknown_model", **{"nothing": model, "/models/qwen3": base})
        if self.poison in body["prompt"]:
            return self.poisoned
        if problem := self._objection(body):
            return problem
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        slot = BASE_SLOT if model == base else self._slots[model]
        try:
            if body.get("stream"):
                await self._stream(self._completion(body, slot), writer)
                return None
            await asyncio.sleep(self.token_s * body["max_tokens"])
            return 200, self._completion(body, slot)
        finally:
            self.num_running -= 1

    async def _stream(self, answer: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """An answer as events: a token each, then the usage."""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in stream_events(answer, self.broken_stream):
            data = f"data: {event}\n\n".encode()
            await asyncio.sleep(self.token_s)
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _objection(self, body: dict[str, Any]) -> Answer | None:
        if body["logprobs"] > self.max_logprobs:
            return recorded("logprobs_max", **{"65": str(body["logprobs"]), "64": str(self.max_logprobs)})
        if body["temperature"] > 2.0:
            return recorded("temperature", **{"3.0": str(body["temperature"])})
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return recorded("context", **{"4000": str(body["max_tokens"]), "2048": str(self.max_model_len)})
        if len(body["stop"]) > STOP_STRINGS_MAX:
            return recorded("stop")
        if any(token >= self.vocab_size for token in body["prompt"]):
            return recorded("vocabulary")
        return None

    def _completion(self, body: dict[str, Any], slot: int) -> Any:
        spec = SequenceSpec(
            sequence_id=0, sampler_slot=slot, adapter_version="", prompt_index=0, max_tokens=body["max_tokens"],
            temperature=body["temperature"], top_k=body["top_k"], top_p=body["top_p"], seed=body["seed"],
            stop_token_ids=tuple(body["stop_token_ids"]), stop_strings=tuple(body["stop"]),
            topk_logprobs=body["logprobs"], min_tokens=body["min_tokens"],
            logit_bias=tuple((int(token), bias) for token, bias in (body["logit_bias"] or {}).items()),
        )  # fmt: skip
        finished, tensors = self._engine.complete(spec, np.array(body["prompt"], np.int32))
        tokens, logprobs = (
            tensors[finished.tokens_index].tolist(),
            (tensors[finished.logprobs_index] + self.off_by).tolist(),
        )
        top = [{f"token_id:{token}": logprob} for token, logprob in zip(tokens, logprobs, strict=True)]
        if body["logprobs"]:
            ids, values = tensors[finished.topk_token_ids_index], tensors[finished.topk_logprobs_index]
            for row, candidates in enumerate(top):
                candidates |= {f"token_id:{t}": float(v) for t, v in zip(ids[row], values[row], strict=True)}
        self.num_completions += 1
        answer = copy.deepcopy(ANSWERS["completion"]["body"])
        answer["model"] = body["model"]
        answer["choices"][0] |= {"finish_reason": finished.stop_reason, "token_ids": tokens, "text": ""}
        answer["choices"][0]["logprobs"] |= {
            "token_logprobs": logprobs, "top_logprobs": top, "tokens": [f"token_id:{token}" for token in tokens]
        }  # fmt: skip
        if self.tells_times:
            answer["metrics"] = {"generation_time_ms": 1000 * self.token_s * (len(tokens) - 1)}
        return answer


def stream_events(answer: dict[str, Any], is_broken: bool) -> Iterator[str]:
    """The events' data, as vLLM has them."""
    head = {key: answer[key] for key in ("id", "object", "created", "model")}
    choice = answer["choices"][0]
    last = len(choice["token_ids"]) - 1
    for place, token in enumerate(choice["token_ids"]):
        if is_broken and place == last:
            yield json.dumps({"error": {"message": "EngineCore encountered an issue.", "code": 500}})
            break
        logprobs = {name: values[place : place + 1] for name, values in choice["logprobs"].items()}
        reason = choice["finish_reason"] if place == last else None
        part = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": reason, "token_ids": [token]}
        yield json.dumps(head | {"choices": [part]})
    else:
        yield json.dumps(head | {"choices": [], "usage": answer["usage"], "metrics": answer["metrics"]})
    yield "[DONE]"


def recorded(name: str, **replacements: str) -> Answer:
    """A recorded answer, with other names and numbers in its message."""
    answer = copy.deepcopy(ANSWERS[name])
    body = answer["body"]
    if isinstance(body, dict) and "error" in body:
        body["error"]["message"] = _replaced(body["error"]["message"], replacements)
    elif isinstance(body, str):
        body = _replaced(body, {f"'{old}'": f"'{new}'" for old, new in replacements.items()})
    return answer["status"], body


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes] | None:
    """Method, path, headers, body; None when the client has closed its connection."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return method, path, headers, await reader.readexactly(int(headers.get("content-length", 0)))
