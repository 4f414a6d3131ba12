"""Keys and who they stand for."""

import pytest

from tx_async.api import owner
from tx_async.errors import ConfigError, Unauthorized


def test_a_key_is_known_by_its_hash_only(tmp_path):
    key = owner.new_key()
    file = tmp_path / "keys"
    file.write_text(f"# comment\n\n{owner.hash_key(key)} alice's laptop  # note\n")
    owners = owner.Owners(owner.read_registry(str(file)))
    name = owners.authenticate(key)
    assert key not in name and owner.hash_key(key) not in name
    assert owners.name_of(key) == "alice's laptop"
    for stranger in (None, "", "tml-other", owner.hash_key(key)):
        with pytest.raises(Unauthorized):
            owners.authenticate(stranger)


def test_without_a_registry_each_key_is_its_own_tenant():
    owners = owner.Owners()
    assert owners.authenticate("tml-a") == owners.authenticate("tml-a") != owners.authenticate("tml-b")
    assert owners.authenticate(None) == owners.authenticate("")


def test_without_a_registry_only_loopback_is_answered():
    """Whatever started the server: nobody else's machine may use one without keys."""
    for address in ("127.0.0.1", "127.3.2.1", "::1", "", "/run/tx.sock", "testserver"):
        owner.Owners().authenticate("tml-a", address)
    for address in ("192.168.1.5", "10.0.0.1", "::", "2001:db8::1"):
        with pytest.raises(Unauthorized, match="api_keys_file"):
            owner.Owners().authenticate("tml-a", address)
        owner.Owners({owner.hash_key("tml-a"): "alice"}).authenticate("tml-a", address)


@pytest.mark.parametrize("line", ["tml-plain-key alice", "abc", "Z" * 64])
def test_a_line_that_is_no_hash_is_named(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(f"# first\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        owner.read_registry(str(file))


def test_a_missing_registry_is_an_error_at_start(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        owner.read_registry(str(tmp_path / "none"))
