"""One table says what a platform is: two columns, chosen in one place, handed in everywhere."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from tx_async.engine import platform
from tx_async.engine.platform import ACCELERATOR, CPU

ROOT = Path(__file__).parents[2]
ASKS = re.compile(r"""default_backend\(|platform\s*[!=]=\s*["']cpu["']""")


def test_nobody_else_asks_where_it_runs():
    files = [*(ROOT / "tx_async").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    asking = {str(file.relative_to(ROOT)) for file in files if ASKS.search(file.read_text())}
    assert asking == {"tx_async/engine/platform.py"}


def test_a_platform_is_a_value():
    """Programs are found again by what they are bound to, so equal tables must be equal."""
    assert platform.of("gpu") == platform.of("gpu") == ACCELERATOR
    assert hash(platform.of("cpu")) == hash(CPU)
    assert platform.of("tpu").name == "tpu" and platform.of("tpu").dtype == "bfloat16"
    with pytest.raises(AttributeError):
        CPU.dtype = "bfloat16"  # type: ignore[misc]


def test_every_fact_of_the_table_is_used_outside_of_it():
    sources = "\n".join(file.read_text() for file in (ROOT / "tx_async").rglob("*.py") if file.name != "platform.py")
    ways = {name: "rule_chunks(" for name in ("rule_chunk", "keeps_rule_states")}
    ways["attention_blocks"] = "attention_block("
    unused = [field.name for field in fields(CPU) if ways.get(field.name, f".{field.name}") not in sources]
    assert not unused


def test_what_only_a_cpu_wants_is_off_elsewhere():
    only_cpu = (
        "joins_lora",
        "keeps_rule_states",
        "decodes_in_place",
        "own_rank_programs",
        "copies_weights",
        "overlaps",
    )
    assert all(getattr(CPU, name) for name in only_cpu)
    assert not any(getattr(ACCELERATOR, name) for name in only_cpu)


def test_rows_below_512_tokens_do_not_exist_on_an_accelerator():
    assert ACCELERATOR.shortest_row == 512
