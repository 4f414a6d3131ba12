"""A network that repeats, delays, reorders and cuts: everything happens once, in order."""

from pathlib import Path

import pytest

from tests.support.durability import Told, killing, serving, stored, train
from tests.support.proxy import Mischief, unreliable

STEPS = 10


@pytest.mark.parametrize("with_kills", [False, True])
def test_a_run_over_an_unreliable_network_is_the_run_over_a_good_one(
    fake_clean: tuple[Told, dict[str, str]],
    tiny_qwen3: Path,
    tmp_path_factory: pytest.TempPathFactory,
    side_by_side,
    request: pytest.FixtureRequest,
    with_kills: bool,
    kill_seed: int,
):
    def case(with_kills: bool, kill_seed: int) -> None:
        mischief = Mischief(kill_seed)
        with serving(tmp_path_factory.mktemp("server"), tiny_qwen3, snapshot_every_steps=3) as server:
            with (
                unreliable(server.port, mischief) as base_url,
                killing(server, kill_seed, ("server", "worker"), number=2 * with_kills, every_s=(0.3, 1.0)),
            ):
                told = train(base_url, tiny_qwen3, STEPS)
            server.wait_ready()
        assert all(mischief.done[name] for name in ("repeat", "delay", "cut_before", "cut_after")), mischief.done
        assert told == fake_clean[0]
        assert stored(server) == fake_clean[1]

    side_by_side.run(request.node, case)
