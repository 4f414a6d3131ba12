"""Recipes of tinker-cookbook as they are, with data sets and a tokenizer made on the spot.

COOKBOOK_VENV names an environment that has tinker-cookbook: it needs torch, so it is not in the test path.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import tinker

from tx_async.testing.models import QWEN3_5_TINY, make_model, make_qwen3
from tx_async.testing.server import running_server

VENV = os.environ.get("COOKBOOK_VENV", "")
pytestmark = pytest.mark.skipif(not VENV, reason="COOKBOOK_VENV names no environment that has tinker-cookbook")

NAME = "Qwen/Qwen3-8B-Base"
"""Of the cookbook's table: its renderer is plain text, with the stop string that follows an answer."""
KEY = "tml-cookbook"
RECIPE_S = 280
QUESTION_SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder to run recipes in: the hub's names are folders of it."""
    place = tmp_path_factory.mktemp("cookbook")
    make_qwen3(place / NAME)
    talk = [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": "Something."}]
    _write_lines(place / "HuggingFaceH4/no_robots/train.jsonl", [{"messages": talk}] * 8)
    gsm8k = [{"question": f"What is {n} + 7?", "answer": f"It is easy.\n#### {7 + n % 2}"} for n in range(8)]
    _write_lines(place / "openai/gsm8k/train.jsonl", gsm8k)
    splits = "".join(f"  - split: {split}\n    path: train.jsonl\n" for split in ("train", "test"))
    (place / "openai/gsm8k/README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}---\n")
    pair = [{"chosen": f"{talk_about(n)}Good.", "rejected": f"{talk_about(n)}Bad, worse."} for n in range(8)]
    for split in ("train", "test"):
        _write_lines(place / f"Anthropic/hh-rlhf/{split}.jsonl", pair)
    _write_lines(place / "zwhe99/DeepMath-103K/train.jsonl", [{"question": f"What is {n} times 3?"} for n in range(8)])
    item = {"rubric_str": "Is it right?", "extraction_regex": "<score>(.*?)</score>"}
    item |= {"grader_output_format_instruction": "Put your score into <score> ... </score>."}
    asked = [{"convo": [{"role": "user", "content": f"What is {n} + 1?"}], "rubric_items": [item]} for n in range(8)]
    _write_lines(place / "rubric.jsonl", asked)
    return place


def talk_about(n: int) -> str:
    return f"\n\nHuman: Say something about {n}.\n\nAssistant: "


def _write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def server(place):
    with running_server(place / NAME, base_model_name=NAME) as server:
        yield server


@pytest.fixture(scope="module")
def state(server) -> str:
    """A checkpoint of a policy that has learned to answer \\boxed{7} or \\boxed{8}, each as often."""
    with tinker.ServiceClient(base_url=server.base_url, api_key=KEY) as service:
        trainer = service.create_lora_training_client(base_model=NAME, rank=4).result()
        loss = math.inf
        for step in range(60):
            data = [_answering(n, digit) for n in (2 * step % 8, (2 * step + 1) % 8) for digit in "78"]
            result = trainer.forward_backward(data, "cross_entropy")
            trainer.optim_step(tinker.AdamParams(learning_rate=5e-3)).result()
            loss = result.result().metrics["loss:sum"] / len(data)
            if loss < 1.2:  # of one answer; what must be left is the choice between two digits, log 2
                return trainer.save_state("prepared").result().path
    pytest.fail(f"the policy did not learn to answer: {loss}")


@pytest.fixture
def recipe(place, server, tmp_path):
    """recipe(name, **settings) -> (its metrics, one row a step; its last checkpoint)."""

    def run(name: str, **settings) -> tuple[list[dict], dict]:
        given = {"model_name": NAME, "log_path": tmp_path / "log", "max_steps": 2}
        arguments = [f"{key}={value}" for key, value in (given | settings).items()]
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TX_", "JAX"))}
        environ |= {"TINKER_BASE_URL": server.base_url, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"}
        environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        command = [f"{VENV}/bin/python", "-m", f"tinker_cookbook.recipes.{name}", *arguments]
        done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=RECIPE_S)
        assert done.returncode == 0, done.stderr[-4000:]
        return _lines(tmp_path / "log/metrics.jsonl"), _lines(tmp_path / "log/checkpoints.jsonl")[-1]

    return run


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sl_loop_trains_and_saves(recipe):
    metrics, checkpoint = recipe("sl_loop", max_length=256, batch_size=2, lora_rank=4)
    losses = [row["train_mean_nll"] for row in metrics if "train_mean_nll" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[1] < losses[0]
    assert checkpoint["state_path"].startswith("tinker://") and checkpoint["sampler_path"].startswith("tinker://")


@pytest.mark.parametrize("loss", ["loss_fn=default", "loss_fn=importance_sampling", "loss_fn=cispo", "loss_fn=gspo"])
def test_rl_loop_samples_and_trains(recipe, state, tmp_path, loss):
    """The policy answers 7 or 8 from the start, each as often, so that rewards differ."""
    (tmp_path / "log").mkdir()
    prepared = {"name": "prepared", "batch": 0, "state_path": state}
    (tmp_path / "log/checkpoints.jsonl").write_text(json.dumps(prepared) + "\n")
    chosen = {} if loss == "loss_fn=default" else {"loss_fn": loss.partition("=")[2]}
    metrics, checkpoint = recipe("rl_loop", group_size=8, max_tokens=24, batch_size=2, lora_rank=4, **chosen)
    steps = [row for row in metrics if "reward/total" in row]
    assert len(steps) == 2 and any(0 < row["reward/total"] < 1 for row in steps)
    assert any(row.get("grad_norm", 0) > 0 for row in steps), "a step was taken"
    assert checkpoint["name"] == "final"


GROUPS = {"groups_per_batch": 2, "max_tokens": 6, "lora_rank": 4}
GRADER = {"grader_llm_name": NAME, "grader_renderer_name": "role_colon", "renderer_name": "role_colon"}
RECIPES = {
    "math_rl": ("math_rl.train", {"env": "gsm8k", "group_size": 4} | GROUPS),
    "async RL": ("math_rl.train", {"env": "gsm8k", "group_size": 4, "max_steps_off_policy": 1} | GROUPS),
    "rubric": (
        "rubric.train",
        {"train_jsonl_path": "rubric.jsonl", "test_jsonl_path": "rubric.jsonl", "train_group_size": 2, "eval_every": 0}
        | GRADER
        | GROUPS,
    ),
    "DPO": ("preference.dpo.train", {"dataset": "hhh", "batch_size": 4, "max_length": 256}),
    "distillation": (
        "distillation.on_policy_distillation",
        {"dataset": "deepmath", "teacher_model": NAME, "group_size": 2} | GROUPS | {"lora_rank": 128},
    ),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_other_recipes_run_to_their_final_checkpoint(recipe, kind):
    """With the losses that are their defaults; the rank of distillation is the recipe's own."""
    name, settings = RECIPES[kind]
    metrics, checkpoint = recipe(name, **settings)
    assert metrics and checkpoint["name"] == "final" and checkpoint["state_path"].startswith("tinker://")


TAKE_HOME = """
import sys
from tinker_cookbook import weights
path, base, out = sys.argv[1:]
weights.download(tinker_path=path, output_dir=f"{out}/adapter")
weights.build_lora_adapter(base_model=base, adapter_path=f"{out}/adapter", output_path=f"{out}/peft")
weights.build_hf_model(base_model=base, adapter_path=f"{out}/adapter", output_path=f"{out}/merged")
"""


def test_a_recipes_checkpoint_is_downloaded_and_built_into_an_adapter_and_a_model(place, server, state, tmp_path):
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TX_", "JAX"))}
    environ |= {"TINKER_BASE_URL": server.base_url, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"}
    command = [f"{VENV}/bin/python", "-c", TAKE_HOME, state, str(place / NAME), str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=RECIPE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "peft/adapter_model.safetensors").exists() and list((tmp_path / "merged").glob("*.safetensors"))


def _byte_tokens(text: str) -> list[int]:
    """As `make_byte_tokenizer` numbers them: the characters that stand for bytes, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    order = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    ((pieces, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [order[character] for character in pieces]


def _answering(n: int, digit: str) -> tinker.Datum:
    shot = (
        f"User: How many r's are in strawberry?{QUESTION_SUFFIX}\n\nAssistant: Let's spell the word out and number all "
        "the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. We have r's at positions 3, 8, and 9. "
        "\\boxed{3}\n\n"
    )
    prompt = _byte_tokens(f"{shot}User: What is {n} + 7?{QUESTION_SUFFIX}\n\nAssistant:")
    answer = _byte_tokens(f" \\boxed{{{digit}}}\n\nUser:")
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
            "weights": tinker.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
        },
    )


STOPS_OF = """
import json, sys
from tinker_cookbook import model_info, renderers
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for name in sys.argv[2:]:
    renderer = renderers.get_renderer(model_info.get_recommended_renderer_name(name), tokenizer)
    print(json.dumps(renderer.get_stop_sequences()))
"""
NAMES = ("Qwen/Qwen3.5-9B", "Qwen/Qwen3.6-27B", "openai/gpt-oss-20b", "Qwen/Qwen3.5-9B-Base")
MARKS = ["<|im_start|>", "<|im_end|>", "<|return|>", "<|call|>"]


def test_models_of_today_are_served_by_the_tables_names_and_end_at_their_renderers_stops(tmp_path):
    """One hybrid by all the names, with a tokenizer that has the marks of all their renderers."""
    from tokenizers import Tokenizer

    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    folder = make_model(tmp_path / "model", QWEN3_5_TINY | layers | {"vocab_size": 257 + len(MARKS)})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(folder / "tokenizer.json"))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
        "HF_HUB_OFFLINE": "1"
    }
    asked = [f"{VENV}/bin/python", "-c", STOPS_OF, str(folder), *NAMES]
    said = subprocess.run(asked, env=environ, capture_output=True, text=True, check=True, timeout=RECIPE_S).stdout
    stops = dict(zip(NAMES, map(json.loads, said.splitlines()), strict=True))
    assert stops["openai/gpt-oss-20b"] == [259, 260] and stops["Qwen/Qwen3.5-9B"] == [258]
    with (
        running_server(folder, base_model_name=",".join(NAMES)) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key=KEY) as service,
    ):
        futures = {}
        for name, stop in stops.items():
            params = tinker.SamplingParams(max_tokens=120, temperature=1.0, seed=1, stop=stop)
            sampler = service.create_sampling_client(base_model=name).result()
            futures[name] = sampler.sample(tinker.ModelInput.from_ints([1, 2, 3]), 16, params)
        for name, future in futures.items():
            sequences = future.result().sequences
            if name.endswith("-Base"):
                continue  # a string that random tokens do not spell
            ends = {sequence.tokens[-1] for sequence in sequences if sequence.stop_reason == "stop"}
            assert ends & set(stops[name]), "one of them is drawn now and then"
            others = {token for sequence in sequences for token in sequence.tokens[:-1]}
            assert not others & set(stops[name]), "and nothing follows it"
