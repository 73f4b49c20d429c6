"""The machine that a process runs on, by name."""

import os
import platform

import jax


def device_name() -> str:
    """Name the device that JAX computes on, and its host."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{jax.devices()[0].device_kind} ({machine})"
