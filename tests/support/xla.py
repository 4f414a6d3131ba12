"""What tests tell XLA. It reads the variable once, when JAX makes its first device."""

LIGHT = "--xla_backend_optimization_level=0"
"""Compiles in about half the time. Tests compile much and compute little; numbers differ by rounding alone."""


def flags(num_devices: int) -> dict[str, str]:
    """The variable for a process with so many fake CPU devices."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} {LIGHT}"}
