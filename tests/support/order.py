"""The files that take longest come first, so that both processes of a run end at about the same time."""

LONGEST = (
    "mesh/test_mesh_server.py",
    "models/test_training_parity.py",
    "engine/test_decode_architectures.py",
    "mesh/test_engine_on_mesh.py",
    "durability/test_faults.py",
    "engine/test_sharding.py",
    "durability/test_kills.py",
    "models/test_decoder.py",
    "durability/test_fail_points.py",
    "engine/test_decode.py",
    "sdk/test_ranks.py",
    "examples/test_examples.py",
    "simulation/test_worlds.py",
    "models/test_parity.py",
    "sdk/test_compatible.py",
    "test_cli.py",
    "mesh/test_two_hosts.py",
    "bench/test_gpu.py",
    "conformance/test_engine.py",
    "durability/test_many_models.py",
    "test_demo.py",
    "durability/test_soak.py",
    "models/test_load.py",
    "engine/test_isolation.py",
    "engine/test_recurrent_state.py",
    "engine/test_layers_apart.py",
    "engine/test_train.py",
    "engine/test_checkpoints.py",
    "engine/test_compilation.py",
)
"""Twenty seconds of processor time and more, below `tests/`. A file that is missing here costs balance alone."""


def place_of(file: str) -> int:
    """file: its path below `tests/`."""
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)
