"""What tests tell XLA. It reads the variable once, when JAX makes its first device."""

from importlib.metadata import version

LIGHT = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
"""Compiles in about half the time. Tests compile much and compute little; numbers differ by rounding alone. One part
instead of up to 32 is the same code: two cores gain nothing from compiling the parts side by side."""
if version("jaxlib").startswith("0.10."):
    # The emitters before MLIR's, which later versions no longer have: they take a third of the time, and logits and
    # gradients of models with every kind of layer keep their bits.
    LIGHT += " --xla_cpu_use_fusion_emitters=false"


def flags(num_devices: int) -> dict[str, str]:
    """The variable for a process with so many fake CPU devices."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} {LIGHT}"}
