"""Several users at once: each trains and samples an adapter of its own, and sees nothing of the others'."""

from concurrent.futures import ThreadPoolExecutor

import tinker

from tx_async.demo import Translation

PROMPT = "My name is"
NAMES = ("Ada", "Alan", "Barbara", "Edsger", "Grace", "Kathleen", "Konrad", "Margaret")
STEPS = 30
SAMPLES = 12


def datum_of(tokenizer, text: str) -> tinker.Datum:
    prompt, completion = tokenizer.encode(PROMPT), tokenizer.encode(f" {text}\n")
    tokens, weights = prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=weights[1:], dtype="float32"),
        },
    )


def ask(sampler, tokenizer, num_samples: int = 1) -> list[str]:
    params = tinker.SamplingParams(max_tokens=16, temperature=0.0, stop=["\n"])
    prompt = tinker.ModelInput.from_ints(tokenizer.encode(PROMPT))
    response = sampler.sample(prompt, num_samples=num_samples, sampling_params=params).result()
    return [tokenizer.decode(sequence.tokens) for sequence in response.sequences]


def learn_a_name(base_url: str, base_model: str, name: str) -> Translation:
    """One user: a session, an adapter, its training, its samples."""
    with tinker.ServiceClient(base_url=base_url, api_key=f"tml-{name}") as service:
        trainer = service.create_lora_training_client(base_model=base_model, rank=8, seed=1).result()
        tokenizer = trainer.get_tokenizer()
        data = [datum_of(tokenizer, name)]
        steps = []
        for _ in range(STEPS):
            steps.append(trainer.forward_backward(data, "cross_entropy"))
            steps.append(trainer.optim_step(tinker.AdamParams(learning_rate=5e-3)))
        for step in steps:
            step.result()
        sampler = trainer.save_weights_and_get_sampling_client().result()
        (sampled,) = set(ask(sampler, tokenizer, num_samples=4))
        return Translation(PROMPT, name, sampled.strip())


def sample_the_base_model(base_url: str, base_model: str) -> list[str]:
    with tinker.ServiceClient(base_url=base_url, api_key="tml-sampler") as service:
        sampler = service.create_sampling_client(base_model=base_model).result()
        tokenizer = sampler.get_tokenizer()
        return [ask(sampler, tokenizer)[0] for _ in range(SAMPLES)]


def test_eight_clients_train_at_once_while_others_sample_and_each_sees_only_its_own_adapter(server, tiny_qwen3):
    """One prompt, eight answers; and greedy samples of the base model stay the same, whatever is trained beside."""
    base_model = str(tiny_qwen3)
    before = sample_the_base_model(server.base_url, base_model)
    with ThreadPoolExecutor(len(NAMES) + 2) as pool:
        learners = [pool.submit(learn_a_name, server.base_url, base_model, name) for name in NAMES]
        samplers = [pool.submit(sample_the_base_model, server.base_url, base_model) for _ in range(2)]
        answers = [learner.result() for learner in learners]
        meanwhile = [sampler.result() for sampler in samplers]
    assert [answer.sampled for answer in answers] == list(NAMES)
    assert len(set(before)) == 1
    assert all(set(samples) == set(before) for samples in meanwhile)
