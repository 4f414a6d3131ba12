"""lm-eval's own command on two small tasks from a file, against a real server: its log-likelihoods are those of
`compute_logprobs`, and its answers are the greedy ones."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval[api] is not installed")

QUESTIONS = [("Ada was born in", "1815"), ("Water boils at", "100"), ("é and 🙂 are", "two"), ("One and one is", "2")]
CHOICES = [" 1815", " a hundred", " two é", " 2"]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, temperature: 0.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def samples(server, tiny_qwen3, tmp_path_factory) -> dict[str, list[dict]]:
    """What it logs of each document, by task."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "answer": answer, "choices": CHOICES, "label": i}
        for i, (question, answer) in enumerate(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(task.format(file=folder / "rows.jsonl"))
    settings = {
        "model": tiny_qwen3,
        "base_url": f"{server.base_url}/oai/api/v1/completions",
        "tokenizer": tiny_qwen3,
        "num_concurrent": 2,
        "max_retries": 1,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += ["--tasks", "local_choice,local_answer", "--include_path", str(folder)]
    command += ["--log_samples", "--output_path", str(folder / "out")]
    environ = os.environ | {"OPENAI_API_KEY": "tml-dummy", "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: logged(folder / "out", f"local_{name}") for name in ("choice", "answer")}


def logged(folder: Path, task: str) -> list[dict]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len(QUESTIONS)
    return sorted(found, key=lambda sample: sample["doc_id"])


def test_its_log_likelihoods_are_those_of_compute_logprobs(samples, service, tiny_qwen3):
    import tinker

    sampler = service.create_sampling_client(base_model=str(tiny_qwen3)).result()
    tokenizer = sampler.get_tokenizer()
    for sample, (question, _) in zip(samples["choice"], QUESTIONS, strict=True):
        for (found, _), choice in zip(sample["filtered_resps"], CHOICES, strict=True):
            asked = tokenizer.encode(question, add_special_tokens=False)
            tokens = tokenizer.encode(question + choice, add_special_tokens=False)
            scored = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
            assert float(found) == pytest.approx(sum(scored[len(asked) :]), abs=1e-3)


def test_its_answers_are_the_greedy_ones(samples, server, tiny_qwen3):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="tml-dummy", max_retries=0) as client:
        for sample, (question, _) in zip(samples["answer"], QUESTIONS, strict=True):
            expected = client.completions.create(
                model=str(tiny_qwen3), prompt=question, max_tokens=8, temperature=0, stop="\n"
            )
            assert sample["resps"] == [[expected.choices[0].text]]
