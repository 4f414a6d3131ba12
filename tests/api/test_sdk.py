"""The real SDK, over a real socket, against the API and the fake scheduler: the client is the specification."""

import asyncio
import concurrent.futures
import json
import pickle
import socket
import threading
import urllib.request

import pytest
import tinker
from hypercorn.asyncio import serve
from hypercorn.config import Config
from tinker import types

from tx_async.api.routes import create_api
from tx_async.config import ServerConfig
from tx_async.testing.fake_scheduler import FakeScheduler
from tx_async.testing.sdk import collect_connections

# The SDK announces its own changes, and leaves the sockets of its pools to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class ServerThread:
    """Hypercorn on a free port of loopback, in a thread of this process."""

    def __init__(self, scheduler: FakeScheduler):
        self.scheduler = scheduler
        listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._listener = listener.detach()  # Hypercorn closes it
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        config = Config()
        config.bind = [f"fd://{self._listener}"]
        config.loglevel = "ERROR"
        config.graceful_timeout = 0.1
        settings = ServerConfig(long_poll_ms=500)
        app = create_api(self.scheduler, settings, self.scheduler.files)
        await serve(app, config, shutdown_trigger=self._stopping.wait)  # type: ignore[arg-type]

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        self._loop.close()

    def call(self, function, *arguments):
        """Run something in the server's thread."""
        done = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(lambda: done.set_result(function(*arguments)))
        return done.result(5)


@pytest.fixture(scope="module")
def server():
    with ServerThread(FakeScheduler()) as server:
        yield server


@pytest.fixture(scope="module")
def service(server):
    client = tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy", user_metadata={"team": "red"})
    yield client
    client.close("success").result()
    del client
    collect_connections()


@pytest.fixture
def training(service):
    return service.create_lora_training_client(base_model="fake/model", rank=8).result()


@pytest.fixture
def rest(service):
    return service.create_rest_client()


def datum(tokens=(1, 2, 3)) -> types.Datum:
    inputs = {"target_tokens": [token + 1 for token in tokens], "weights": [1.0] * len(tokens)}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def policy_datum() -> types.Datum:
    inputs = {"target_tokens": [2, 3], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}
    return types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)


# ---- training


def test_the_users_loop(training):
    for step in range(1, 4):
        output = training.forward_backward([datum(), datum((4, 5))], "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-4))
        assert len(output.result().loss_fn_outputs) == 2
        assert output.result().loss_fn_outputs[0]["logprobs"].tolist() == pytest.approx([-0.2, -0.3, -0.4])
        assert output.result().metrics["loss:sum"] == pytest.approx(2.0)
        assert stepped.result().metrics == {"step": step}


def test_a_batch_of_many_chunks_arrives_out_of_order_and_comes_back_in_order(training):
    data = [datum((i % 900, 1)) for i in range(2500)]
    output = training.forward_backward(data, "cross_entropy").result()
    assert len(output.loss_fn_outputs) == 2500
    assert [o["logprobs"].tolist()[0] for o in output.loss_fn_outputs] == pytest.approx(
        [-((i % 900 + 1) % 10) / 10 for i in range(2500)]
    )


@pytest.mark.parametrize(
    "loss_fn, config",
    [
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.9}),
        ("cispo", None),
        ("dro", {"beta": 0.05}),
        ("gspo", None),
    ],
)
def test_policy_losses(training, loss_fn, config):
    output = training.forward_backward([policy_datum()], loss_fn, loss_fn_config=config).result()
    assert output.loss_fn_outputs[0]["logprobs"].shape == [2]


def test_forward_and_a_custom_loss(training):
    torch = pytest.importorskip("torch")
    assert training.forward([datum()], "cross_entropy").result().metrics["loss:sum"] == pytest.approx(0.9)

    def loss(data, logprobs):
        return sum((lp**2).sum() for lp in logprobs), {"n": torch.tensor(float(len(data)))}

    output = training.forward_backward_custom([datum()], loss).result()
    assert output.metrics["loss:sum"] == pytest.approx(0.29, rel=1e-4)


@pytest.mark.parametrize("learning_rate", [float("nan"), float("inf"), -1.0])
def test_a_bad_step_fails_and_the_client_goes_on(training, learning_rate):
    with pytest.raises(tinker.RequestFailedError) as failed:
        training.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
    assert failed.value.category == types.RequestErrorCategory.User
    assert "learning_rate" in str(failed.value)
    assert training.optim_step(types.AdamParams()).result().metrics


def test_bad_data_fails_with_the_servers_words(training):
    with pytest.raises(tinker.RequestFailedError, match="vocabulary"):
        training.forward_backward([datum((5000, 1))], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="no_such_loss"):
        training.forward_backward([datum()], "no_such_loss").result()
    assert training.forward_backward([datum()], "cross_entropy").result().metrics


def test_a_model_that_cannot_be_is_refused_at_once(service):
    with pytest.raises(tinker.BadRequestError, match="rank"):
        service.create_lora_training_client(base_model="fake/model", rank=1000).result()
    with pytest.raises(tinker.BadRequestError, match="base_model"):
        service.create_lora_training_client(base_model="other/model").result()


def test_info(training):
    info = training.get_info()
    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == ("fake/model", 8, True)


# ---- weights


def test_saving_and_loading(service, training):
    path = training.save_state("one", user_metadata={"k": "v"}).result().path
    assert training.load_state(path).result().path == path
    assert training.load_state_with_optimizer(path).result().path == path
    restored = service.create_training_client_from_state_with_optimizer(path).result()
    assert restored.get_info().lora_rank == 8
    assert restored.forward_backward([datum()], "cross_entropy").result().metrics
    with pytest.raises(tinker.RequestFailedError, match="overwrite"):
        training.save_state("one").result()
    assert training.save_state("one", overwrite=True).result().path == path


def test_exports_have_links_to_their_files(training, rest):
    path = training.save_weights_external("export").result().path
    answer = rest.get_external_weights_urls(path).result()
    assert "adapter_model.safetensors" in answer.urls and answer.expires.tzinfo


# ---- sampling


def test_sampling_from_each_kind_of_weights(service, training):
    ephemeral = training.save_weights_and_get_sampling_client().result()
    path = training.save_weights_for_sampler("s").result().path
    named = service.create_sampling_client(model_path=path).result()
    base = service.create_sampling_client(base_model="fake/model").result()
    params = types.SamplingParams(max_tokens=3, temperature=0.0)
    for sampler in (ephemeral, named, base):
        response = sampler.sample(types.ModelInput.from_ints([5, 6]), num_samples=8, sampling_params=params).result()
        assert [sequence.tokens for sequence in response.sequences] == [[7, 8, 9]] * 8
        assert len({sequence.sequence_id for sequence in response.sequences}) == 8
    assert named.get_base_model() == "fake/model"


def test_logprobs_of_a_prompt(service):
    sampler = service.create_sampling_client(base_model="fake/model").result()
    prompt = types.ModelInput.from_ints([5, 6, 7])
    assert sampler.compute_logprobs(prompt).result() == [None, -0.5, -0.5]
    response = sampler.sample(
        prompt,
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
    ).result()
    assert response.topk_prompt_logprobs[0] is None and response.topk_prompt_logprobs[1] == [(0, -1.0), (1, -2.0)]


def test_a_pickled_sampling_client_joins_with_a_number_of_its_own(service, server):
    sampler = service.create_sampling_client(base_model="fake/model").result()
    copy = pickle.loads(pickle.dumps(sampler))
    params = types.SamplingParams(max_tokens=1)
    assert copy.sample(types.ModelInput.from_ints([1]), 1, params).result().sequences[0].tokens == [2]
    copy.holder.close()  # nobody else does: its heartbeat would go on as long as this process
    assert max(s.num_clones for s in server.scheduler.samplers.values()) >= 1


def test_many_samples_at_once(service):
    sampler = service.create_sampling_client(base_model="fake/model").result()
    params = types.SamplingParams(max_tokens=2)
    futures = [sampler.sample(types.ModelInput.from_ints([i]), 1, params) for i in range(1, 101)]
    assert [f.result().sequences[0].tokens[0] for f in futures] == list(range(2, 102))


def test_a_result_that_takes_longer_than_a_poll_arrives(training, server):
    server.scheduler.held = True
    future = training.optim_step(types.AdamParams())
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=1.2)
    server.call(server.scheduler.release)
    assert training.optim_step(types.AdamParams()).result().metrics == {"step": 2}


# ---- rest


def test_a_session_s_trace_is_downloaded_without_a_key(service, rest, tmp_path):
    sampler = service.create_sampling_client(base_model="fake/model").result()
    sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)).result()
    session_id = rest.list_sessions().result().sessions[0]
    url = rest.export_session_trace(session_id).result()
    urllib.request.urlretrieve(url, tmp_path / "session.pftrace")
    events = json.loads((tmp_path / "session.pftrace").read_text())["traceEvents"]
    assert any(event["name"].startswith("sample") for event in events)


def test_runs_checkpoints_and_sessions_are_listed(training, rest):
    path = training.save_state("listed").result().path
    run = rest.get_training_run_by_tinker_path(path).result()
    assert run.last_checkpoint.tinker_path == path
    assert run.training_run_id in [r.training_run_id for r in rest.list_training_runs().result().training_runs]
    assert [c.tinker_path for c in rest.list_checkpoints(run.training_run_id).result().checkpoints] == [path]
    assert path in [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints]
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 8
    session_id = run.training_run_id.split(":")[0]
    assert run.training_run_id in rest.get_session(session_id).result().training_run_ids
    assert session_id in rest.list_sessions().result().sessions


def test_a_checkpoint_is_published_given_a_ttl_and_deleted(training, rest, server):
    path = training.save_state("brief").result().path
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert server.scheduler.checkpoints[path].public
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert server.scheduler.checkpoints[path].expires_at
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert path not in server.scheduler.checkpoints


def test_capabilities(rest):
    (model,) = rest.get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length) == ("fake/model", 512)
