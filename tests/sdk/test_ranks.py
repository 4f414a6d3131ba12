"""Ranks that nobody set: 32 until somebody asks for more, and the same numbers before and after."""

import tinker

from tx_async.testing.server import running_server

BACKEND = {"max_lora_adapters": 2, "max_sampler_adapters": 2, "max_context_length": 32, "sample_max_num_sequences": 4}
ANEW = "worker w0 has ended: wider slots are needed, for an adapter of rank 40"
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


def datum(first: int) -> tinker.Datum:
    tokens = list(range(first, first + 9))
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[8])},
    )


def step(trainer, first: int) -> list[float]:
    trained = trainer.forward_backward([datum(first)], "cross_entropy")
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    return trained.result().loss_fn_outputs[0]["logprobs"].data


def drawn(sampler) -> list[tuple[list[int], list[float]]]:
    params = tinker.SamplingParams(max_tokens=8, temperature=1.0, seed=3, stop=[])
    return [(s.tokens, s.logprobs) for s in sampler.sample(PROMPT, 2, params).result().sequences]


def test_a_rank_above_the_first_slots_delays_others_and_changes_none_of_their_bits(tiny_qwen3, tmp_path):
    """A run goes on in wider slots, and after kill -9, where one that never knew narrow ones would be."""
    with (
        running_server(tiny_qwen3, data_dir=tmp_path, backend_config=BACKEND) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service,
    ):

        def new(rank: int):
            return service.create_lora_training_client(str(tiny_qwen3), rank=rank, seed=7).result()

        early = new(20)
        first = step(early, 5)
        sampler = early.save_weights_and_get_sampling_client().result()
        before = drawn(sampler)
        wide = new(40)
        step(wide, 5)
        assert drawn(sampler) == before
        of_wide = drawn(wide.save_weights_and_get_sampling_client().result())
        assert server.log().count(ANEW) == 1
        server.kill()
        server.start()
        late = new(20)
        assert (step(late, 5), step(late, 6)) == (first, step(early, 6))
        assert drawn(sampler) == before and len(of_wide) == 2
        assert server.log().count(ANEW) == 1, "a live run's rank is known at the next start"
