"""Keys and who they stand for."""

import pytest

from tx_async.api import owner
from tx_async.api.key_file import Key, KeyFile
from tx_async.errors import Forbidden, Unauthorized


def registry(**fields):
    digest = owner.hash_key("tml-a")
    return owner.Owners(lambda: {digest: Key(digest=digest, name="alice", **fields)}, now=lambda: 100.0)


def test_a_key_is_known_by_its_hash_only(tmp_path):
    key = owner.new_key()
    file = tmp_path / "keys"
    file.write_text(f"# comment\n\n{owner.hash_key(key)} alice's laptop  # note\n")
    owners = owner.Owners(KeyFile(str(file)).current)
    name = owners.authenticate(key)
    assert key not in name and owner.hash_key(key) not in name
    registered = owners.find(key)
    assert registered and (registered.name, registered.role) == ("alice's laptop", "user")
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
        registry().authenticate("tml-a", address)


def test_an_expired_key_is_refused_and_told_so():
    assert registry(expires_at=101.0).authenticate("tml-a")
    with pytest.raises(Unauthorized, match="expired"):
        registry(expires_at=100.0).authenticate("tml-a")


def test_only_an_admin_is_one():
    registry(role="admin").require_admin("tml-a")
    with pytest.raises(Forbidden, match="admin"):
        registry().require_admin("tml-a")
    with pytest.raises(Unauthorized):
        registry(role="admin").require_admin("tml-b")
    owner.Owners().require_admin(None, "127.0.0.1")
    assert not owner.Owners().is_admin("tml-a")


def test_a_key_comes_as_its_own_header_or_as_a_bearer():
    assert owner.key_of({"x-api-key": "tml-a", "authorization": "Bearer tml-b"}) == "tml-a"
    assert owner.key_of({"authorization": "bearer tml-b"}) == "tml-b"
    assert owner.key_of({"authorization": "Basic eDp5"}) is owner.key_of({"authorization": "Bearer "}) is None
    assert owner.key_of({}) is None


def test_records_of_a_key_can_be_called_by_its_name():
    digest = owner.hash_key("tml-a")
    keys = {digest: Key(digest=digest, name="alice", owner=owner.owner_of("tml-a"))}
    assert owner.Owners(lambda: keys).names() == {owner.owner_of("tml-a"): "alice"}
    assert owner.Owners().names() == {}
