"""The playground in a real browser, with a real worker behind it: a checkpoint beside the base model, as a prompt and
as a chat. An adapter that was never trained changes nothing, so both say the same."""

import json
from pathlib import Path

import pytest

from tests.support.browser import browsing, find, until, why_not
from tests.support.chat_templates import QWEN3, make_chat_tokenizer
from tests.support.clients import Client
from tx_async.testing.models import make_qwen3
from tx_async.testing.server import running_server

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "a browser is here"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
COMPILED_S = 150
"""The first samples wait for programs that are compiled."""
ANSWERS = """return JSON.stringify([...document.querySelectorAll('.answer')].map((answer) => ({
  title: answer.querySelector('h2').textContent,
  end: answer.querySelector('header span:last-child').textContent,
  tokens: [...answer.querySelectorAll('.token')].map((token) => [token.textContent, token.title]),
})))"""


def test_a_checkpoint_answers_beside_the_base_model(tmp_path: Path):
    from selenium.webdriver.support.ui import Select

    model = make_chat_tokenizer(make_qwen3(tmp_path / "model"), QWEN3)
    with running_server(model, data_dir=tmp_path / "server") as server, browsing(tmp_path / "profile") as driver:
        tenant = Client(server)
        run = tenant.create_model(str(model))
        tenant.save_weights(run, 1, "fresh")
        driver.get(f"{server.base_url}/#/playground")
        until(driver, lambda text: f"fresh (weights) of {run}" in text)
        for name, value in (("temperature", "0"), ("max_tokens", "12")):
            field = find(driver, f"input[name={name}]")
            field.clear()
            field.send_keys(value)
        find(driver, "input[name=compare]").click()
        find(driver, "textarea").send_keys("hello")
        for mode in ("Plain prompt", "Chat"):
            Select(find(driver, "select[name=mode]")).select_by_visible_text(mode)
            find(driver, "button.main").click()
            both = until(driver, lambda text: text.count(", ended by ") == 2, ANSWERS, COMPILED_S)
            checkpoint, base = json.loads(both)
            assert checkpoint["title"] == f"{run}/weights/fresh" and base["title"] == "Base model"
            assert checkpoint["tokens"] == base["tokens"] and 0 < len(base["tokens"]) <= 12
            assert all(title.startswith("logprob -") for _, title in base["tokens"])
