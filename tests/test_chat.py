"""`tx-async chat`: a conversation over HTTP, with a scripted server."""

import io
import json

import httpx
import pytest

from tx_async import chat
from tx_async.errors import ConfigError


class Served:
    """Answers as the OpenAI-compatible route does."""

    def __init__(self, *answers: list[dict] | tuple[int, str]):
        self.answers = list(answers)
        self.asked: list[dict] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "base"}, {"id": "other"}]})
        self.asked.append(json.loads(request.content))
        answer = self.answers.pop(0)
        if isinstance(answer, tuple):
            return httpx.Response(answer[0], json={"error": {"message": answer[1]}})
        return httpx.Response(
            200, text="".join(f"data: {json.dumps(event)}\n\n" for event in answer) + "data: [DONE]\n\n"
        )


def saying(**delta) -> dict:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


@pytest.fixture
def talked(monkeypatch):
    def talk(served: Served, lines: str, code: int = 0, **more) -> str:
        talk = chat.Talk("http://test", "tml-a", **more)
        transport = httpx.MockTransport(served)
        monkeypatch.setattr(
            chat.Talk, "connect", lambda self: httpx.Client(transport=transport, base_url="http://test/oai/api/v1")
        )
        sink = io.StringIO()
        assert chat.run(talk, io.StringIO(lines), sink) == code
        return sink.getvalue()

    return talk


def test_a_conversation_remembers_what_was_said_until_it_begins_anew(talked):
    served = Served([saying(content="He"), saying(content="llo")], [saying(content="Yes")], [saying(content="No")])
    shown = talked(served, "Hi\nReally?\n\nAgain\n", system="Be brief.", fields={"temperature": 0.5})
    system = {"role": "system", "content": "Be brief."}
    assert [asked["messages"] for asked in served.asked] == [
        [system, {"role": "user", "content": "Hi"}],
        [
            system,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Really?"},
        ],
        [system, {"role": "user", "content": "Again"}],
    ]
    assert all(asked["model"] == "base" and asked["temperature"] == 0.5 for asked in served.asked)
    assert "Hello" in shown and "A new conversation." in shown


def test_a_refusal_is_a_line_and_the_exit_code_and_its_message_is_forgotten(talked):
    served = Served((400, "n: too many"), [{"error": {"message": "lost, try again"}}], [saying(content="ok")])
    shown = talked(served, "a\nb\nc\n", code=1, model="tinker://x/sampler_weights/y")
    assert "! n: too many" in shown and "! lost, try again" in shown
    assert served.asked[-1]["messages"] == [{"role": "user", "content": "c"}]
    assert served.asked[-1]["model"] == "tinker://x/sampler_weights/y"


def test_nothing_that_a_model_says_steers_the_terminal(talked):
    said = "a\x1b]0;title\x07b\x00\x9b2J\u202e é\u3000👩\u200d💻\tc\n"
    shown = talked(Served([saying(reasoning_content="\x1b[2J"), saying(content=said)]), "Hi\n")
    assert "[2Ja]0;titleb2J é\u3000👩\u200d💻\tc\n" in shown
    served = Served((400, "\x1b[2Jno"))
    assert "! [2Jno" in talked(served, "Hi\n", code=1)


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match="cannot be reached"):
        chat.run(chat.Talk("http://127.0.0.1:9", ""), io.StringIO(), io.StringIO())
