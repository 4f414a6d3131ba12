"""Workers of other hosts know whether they see the server's storage."""

import pytest

from tx_async.errors import ConfigError
from tx_async.storage.probe import check_probe, write_probe
from tx_async.storage.store import Store

ADDRESS = "tcp://0.0.0.0:7001"


async def test_who_sees_the_same_storage_finds_the_word(tmp_path):
    check_probe(str(tmp_path), await write_probe(Store(tmp_path), ADDRESS))


async def test_a_folder_of_the_same_name_on_another_host_is_refused_and_what_to_set_is_said(tmp_path):
    probe = await write_probe(Store(tmp_path / "here"), ADDRESS)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="checkpoints_base"):
        check_probe(str(tmp_path / "there"), probe)


async def test_a_copy_from_before_the_server_s_start_is_refused(tmp_path):
    old = await write_probe(Store(tmp_path), ADDRESS)
    await write_probe(Store(tmp_path), ADDRESS)
    with pytest.raises(ConfigError):
        check_probe(str(tmp_path), old)


async def test_servers_at_several_addresses_share_a_place(tmp_path):
    first = await write_probe(Store(tmp_path), ADDRESS)
    second = await write_probe(Store(tmp_path), "tcp://0.0.0.0:7002")
    check_probe(str(tmp_path), first)
    check_probe(str(tmp_path), second)
