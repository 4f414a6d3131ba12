import pytest

from tx_async.testing.fake_vllm import FakeVllm
from tx_async.testing.models import make_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("base") / "model", tokenizer=False)


@pytest.fixture
def vllm(model):
    with FakeVllm(str(model)) as server:
        yield server
