"""P4 and P5: what is loaded is what was saved, or nothing; a restored optimizer goes on as if nothing had happened."""

import json
from pathlib import Path

import jax
import numpy as np
import pyrage
import pytest
from safetensors.numpy import load_file, save_file

from tests.support import parity
from tx_async.engine.checkpoints import ADAPTER, GRADIENTS, OPTIMIZER, Checkpoints, SavedAdapter
from tx_async.errors import CorruptedCheckpoint, InvalidRequest, StorageError, UnknownCheckpoint, UserError
from tx_async.models.load import from_config
from tx_async.storage.checkpoint_files import read_checkpoint_sync
from tx_async.storage.store import Store
from tx_async.testing.engine_bench import assert_same_bits, segment
from tx_async.testing.models import QWEN3_5_MOE_TINY, QWEN3_TINY
from tx_async.wire.worker import AdapterConfig, CreateAdapter, LoadSampler, SaveAdapter

LENGTHS = (30, 25, 31, 20)


@pytest.fixture(params=["from memory", "from files"])
def forget(request):
    """forget(bench): whether a load finds what was saved in memory or has to read the files."""

    def drop(bench):
        if request.param == "from files":
            bench.engine.checkpoints._cached.clear()

    return drop


def train(bench, slot, steps, first=0):
    for step in range(first, first + steps):
        bench.train((slot, [segment(LENGTHS[step % 4], step)]))
        bench.step(slot, weight_decay=0.1)


@pytest.mark.parametrize("rank", [8, 3])
def test_save_load_step_is_the_uninterrupted_run_bit_for_bit(bench, forget, rank):
    config = bench.create(0, rank)
    train(bench, 0, 3)
    bench.save(0, config, "run/a")
    train(bench, 0, 3, first=3)
    forget(bench)
    assert bench.load(2, config, "run/a").step == 3
    train(bench, 2, 3, first=3)
    assert_same_bits(bench.state(0), bench.state(2))


def test_without_the_optimizer_moments_step_and_gradients_are_zero(bench, forget):
    config = bench.create(0)
    train(bench, 0, 3)
    bench.train((0, [segment(20, 9)]))
    bench.save(0, config, "run/a", "snapshot")
    forget(bench)
    assert bench.load(1, config, "run/a", optimizer=False).step == 0
    saved, loaded = bench.state(0), bench.state(1)
    assert_same_bits(saved.weights, loaded.weights)
    assert all((x == 0).all() for x in jax.tree.leaves(loaded._replace(weights=None)))
    train(bench, 0, 1)
    train(bench, 1, 1)
    assert not np.array_equal(bench.state(0).weights["layers"]["q"][0], bench.state(1).weights["layers"]["q"][0])


def test_a_snapshot_keeps_half_accumulated_gradients(bench, forget):
    config = bench.create(0)
    train(bench, 0, 2)
    bench.train((0, [segment(20, 8)]))
    bench.save(0, config, "run/s", "snapshot")
    forget(bench)
    bench.load(1, config, "run/s")
    assert_same_bits(bench.state(0), bench.state(1))
    for slot in (0, 1):
        bench.train((slot, [segment(20, 9)]))
        bench.step(slot)
    assert_same_bits(bench.state(0), bench.state(1))


def test_a_training_checkpoint_has_no_gradients(bench, forget):
    config = bench.create(0)
    train(bench, 0, 1)
    bench.train((0, [segment(20, 8)]))
    bench.save(0, config, "run/a")
    forget(bench)
    bench.load(1, config, "run/a")
    assert all((x == 0).all() for x in jax.tree.leaves(bench.state(1).gradients))
    assert_same_bits(bench.state(0)._replace(gradients=None), bench.state(1)._replace(gradients=None))


def test_a_save_is_what_the_slot_held_when_the_command_came(bench):
    """Files are written on another thread, while the slot trains on."""
    config = bench.create(0)
    train(bench, 0, 1)
    before = bench.state(0)
    pending = bench.engine.execute(SaveAdapter(slot=0, config=config, key="run/a", kind="training"), [])
    train(bench, 0, 2, first=1)
    bench.create(0, rank=8)
    pending()
    bench.engine.checkpoints._cached.clear()
    bench.load(1, config, "run/a")
    assert_same_bits(before, bench.state(1))


@pytest.mark.parametrize("kind", ["training", "snapshot", "sampler", "external"])
def test_every_kind_can_be_sampled(bench, forget, kind):
    config = bench.create(0, rank=3)
    train(bench, 0, 2)
    bench.save(0, config, "run/x", kind)
    forget(bench)
    bench.run(LoadSampler(sampler_slot=1, key="run/x"))
    weights = jax.tree.map(lambda w: np.asarray(w)[:, 1], bench.engine.samplers.weights)
    assert_same_bits(bench.state(0).weights, weights)
    assert bench.engine.samplers.scale.tolist() == [0, np.float32(32 / 3)]


def test_a_sampler_checkpoint_holds_no_optimizer(bench, forget):
    config = bench.create(0)
    bench.save(0, config, "run/x", "sampler")
    forget(bench)
    with pytest.raises(InvalidRequest, match="no optimizer state"):
        bench.load(1, config, "run/x")
    assert_cleared(bench, 1, config)
    bench.load(1, config, "run/x", optimizer=False)
    assert_same_bits(bench.state(0).weights, bench.state(1).weights)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (AdapterConfig(rank=8), "rank 4, this model has rank 8"),
        (AdapterConfig(rank=4, train_unembed=False), "train_unembed=True, this model has False"),
    ],
)
def test_another_shape_of_adapter_is_refused(bench, forget, other, message):
    config = bench.create(0, rank=4)
    bench.save(0, config, "run/a")
    forget(bench)
    with pytest.raises(UserError, match=message):
        bench.load(1, other, "run/a")
    assert_cleared(bench, 1, other)


def assert_cleared(bench, slot: int, config: AdapterConfig) -> None:
    """After a load that failed the slot holds what a new adapter holds, nothing of the one before."""
    loaded = bench.state(slot)
    bench.run(CreateAdapter(slot=slot, config=config))
    assert_same_bits(loaded, bench.state(slot))


def folder(bench, key) -> Path:
    return Path(bench.engine.checkpoints.store.base) / key


def test_the_files_are_a_peft_adapter_with_hashes(bench):
    config = bench.create(0, rank=3, train_mlp=False)
    train(bench, 0, 1)
    saved = bench.save(0, config, "run/a", "snapshot")
    files = {path.name: path for path in folder(bench, "run/a").iterdir()}
    tensors = load_file(files[ADAPTER])
    a, b = bench.state(0).weights["layers"]["q"]
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], a[1, :, :3].T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], b[1, :3].T)
    assert not any("mlp" in name for name in tensors)
    metadata = json.loads(files["metadata.json"].read_text())
    assert set(metadata["files"]) == set(files) - {"metadata.json"} >= {ADAPTER, OPTIMIZER, GRADIENTS}
    assert metadata["metadata"]["step"] == 1 and metadata["metadata"]["kind"] == "snapshot"
    assert saved.size_bytes == sum(path.stat().st_size for path in files.values() if path.name != "metadata.json")


@pytest.mark.parametrize("name", [ADAPTER, OPTIMIZER, "adapter_config.json", "metadata.json"])
def test_damage_is_reported_and_not_loaded(bench, name):
    config = bench.create(0)
    bench.save(0, config, "run/a")
    path = folder(bench, "run/a") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    bench.engine.checkpoints._cached.clear()
    bench.create(1)
    train(bench, 1, 1)
    neighbour = bench.state(0)
    with pytest.raises(CorruptedCheckpoint, match="damaged"):
        bench.load(1, config, "run/a")
    assert_cleared(bench, 1, config)
    assert_same_bits(neighbour, bench.state(0))


def test_a_key_without_checkpoint_is_unknown(bench):
    for command in (LoadSampler(sampler_slot=0, key="run/none"),):
        with pytest.raises(UnknownCheckpoint):
            bench.run(command)
    with pytest.raises(UnknownCheckpoint):
        bench.load(0, AdapterConfig(rank=4), "run/none")


def test_weights_that_are_not_finite_are_refused(bench):
    config = bench.create(0)
    bench.save(0, config, "run/a", "sampler")
    files = {path.name: path.read_bytes() for path in folder(bench, "run/a").iterdir() if path.name != "metadata.json"}
    tensors = load_file(folder(bench, "run/a") / ADAPTER)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, folder(bench, "run/a") / ADAPTER)
    write(bench, "run/b", files | {ADAPTER: (folder(bench, "run/a") / ADAPTER).read_bytes()})
    with pytest.raises(UserError, match="NaN or infinite"):
        bench.run(LoadSampler(sampler_slot=0, key="run/b"))


def test_an_adapter_from_elsewhere_is_loaded_at_its_own_rank_and_scale(bench):
    """Only the two PEFT files, alpha 8 and rank 2: B carries the difference to alpha 32."""
    config = bench.create(0, rank=2)
    train(bench, 0, 1)
    bench.save(0, config, "run/a", "external")
    peft_config = json.loads((folder(bench, "run/a") / "adapter_config.json").read_text()) | {"lora_alpha": 8}
    files = {ADAPTER: (folder(bench, "run/a") / ADAPTER).read_bytes()}
    write(bench, "run/b", files | {"adapter_config.json": json.dumps(peft_config).encode()})
    bench.run(LoadSampler(sampler_slot=0, key="run/b"))
    assert bench.engine.samplers.scale[0] == 16
    a, b = bench.engine.samplers.weights["layers"]["q"]
    np.testing.assert_array_equal(a[:, 0], bench.state(0).weights["layers"]["q"][0])
    np.testing.assert_allclose(b[:, 0], bench.state(0).weights["layers"]["q"][1] / 4, rtol=1e-6)


def write(bench, key, files):
    from tx_async.storage.checkpoint_files import write_checkpoint_sync

    write_checkpoint_sync(bench.engine.checkpoints.store, key, files, {})


def test_a_higher_rank_than_the_servers_is_refused(make_bench):
    big, small = make_bench(max_lora_rank=8), make_bench(max_lora_rank=4)
    config = big.create(0, rank=8)
    big.save(0, config, "run/a")
    with pytest.raises(UserError, match="rank 8; this server's maximum is 4"):
        small.run(LoadSampler(sampler_slot=0, key="run/a"))
    assert big.create(0, rank=3) and big.save(0, AdapterConfig(rank=3, seed=1), "run/b")
    small.load(0, AdapterConfig(rank=3, seed=1), "run/b")
    np.testing.assert_array_equal(
        small.state(0).weights["layers"]["q"][0], big.state(0).weights["layers"]["q"][0][..., :4]
    )


def test_memory_of_what_was_saved_is_bounded(bench):
    checkpoints = bench.engine.checkpoints
    config = bench.create(0)
    bench.save(0, config, "run/0")
    checkpoints.cache_bytes_max = 3 * checkpoints._num_bytes
    for number in range(1, 6):
        bench.save(0, config, f"run/{number}")
        checkpoints.load("run/0")
    assert list(checkpoints._cached) == ["run/4", "run/5", "run/0"]
    assert checkpoints._num_bytes == sum(adapter.num_bytes for adapter in checkpoints._cached.values())


def test_a_key_that_leads_out_of_the_storage_is_refused_and_not_kept(bench):
    config = bench.create(0)
    with pytest.raises(UserError):
        bench.save(0, config, "../outside")
    with pytest.raises(UserError):
        bench.run(LoadSampler(sampler_slot=0, key="../outside"))


def test_a_save_that_cannot_be_written_fails_and_changes_nothing_that_a_mesh_must_agree_on(bench):
    """Only one host of a mesh writes. What each keeps in memory must not depend on how that went."""
    config = bench.create(0)
    checkpoints = bench.engine.checkpoints
    Path(checkpoints.store.base, "run").write_text("a file where a folder is needed")
    with pytest.raises(StorageError):
        bench.save(0, config, "run/a")
    assert list(checkpoints._cached) == ["run/a"]
    Path(checkpoints.store.base, "run").unlink()
    bench.save(0, config, "run/a")


def test_what_storage_did_not_take_is_written_later_as_it_was(bench):
    config = bench.create(0)
    train(bench, 0, 1)
    expected, cached = bench.state(0), bench.engine.checkpoints._cached
    folder = Path(bench.engine.checkpoints.store.base, "run")
    folder.write_text("a file where a folder is needed")
    with pytest.raises(StorageError):
        bench.save(0, config, "run/a")
    train(bench, 0, 1)
    folder.unlink()
    again = SaveAdapter(slot=0, config=config, key="run/a", kind="training", again=True)
    bench.run(again)
    cached.clear()
    bench.load(2, config, "run/a")
    assert_same_bits(bench.state(2), expected)
    cached.clear()
    with pytest.raises(UserError, match="not in memory any more"):
        bench.run(again)


# ---- exports


def files_of(bench, key):
    return read_checkpoint_sync(bench.engine.checkpoints.store, key)[1]


def test_an_encrypted_export_is_for_its_recipients_alone(bench, forget):
    config = bench.create(0)
    train(bench, 0, 2)
    mine, other = (pyrage.x25519.Identity.generate() for _ in range(2))  # pyright: ignore[reportAttributeAccessIssue]
    recipients = tuple(str(identity.to_public()) for identity in (mine, other))
    bench.run(SaveAdapter(slot=0, config=config, key="run/plain", kind="external"))
    bench.run(SaveAdapter(slot=0, config=config, key="run/secret", kind="external", age_recipients=recipients))
    forget(bench)
    plain, secret = files_of(bench, "run/plain"), files_of(bench, "run/secret")
    assert set(secret) == {f"{name}.age" for name in plain}
    for name, content in plain.items():
        assert all(pyrage.decrypt(secret[f"{name}.age"], [identity]) == content for identity in (mine, other))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InvalidRequest, match="encrypted"):
        bench.load(1, config, "run/secret", optimizer=False)


def test_an_export_names_its_base(bench):
    config = bench.create(0)
    metadata = {"base_model": "Qwen/Qwen3-0.6B"}
    bench.run(SaveAdapter(slot=0, config=config, key="run/named", kind="external", metadata=metadata))
    peft_config = json.loads(files_of(bench, "run/named")["adapter_config.json"])
    assert peft_config["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(("tied", "train_unembed"), [(True, True), (True, False), (False, True)])
def test_an_export_for_a_tied_model_says_what_merging_gets_wrong(tmp_path, tied, train_unembed):
    """Nothing is computed: only the files are looked at."""
    config = QWEN3_TINY | {"tie_word_embeddings": tied, "num_hidden_layers": 1}
    model, lora = from_config(config), AdapterConfig(rank=2, train_unembed=train_unembed)
    checkpoints = Checkpoints(Store(tmp_path), model, max_rank=2)
    checkpoints.write("run/export", SavedAdapter("external", lora, parity.random_adapter(model, lora)), {})
    files = read_checkpoint_sync(Store(tmp_path), "run/export")[1]
    assert ("README.md" in files) == (tied and train_unembed)
    if "README.md" in files:
        assert b"0.073" in files["README.md"] and b"exclude_unembed" in files["README.md"]


def test_an_export_says_which_part_peft_passes_over(tmp_path):
    model, lora = from_config(QWEN3_5_MOE_TINY), AdapterConfig(rank=2)
    checkpoints = Checkpoints(Store(tmp_path), model, max_rank=2)
    checkpoints.write("run/export", SavedAdapter("external", lora, parity.random_adapter(model, lora)), {})
    assert b"passes over the experts" in read_checkpoint_sync(Store(tmp_path), "run/export")[1]["README.md"]
