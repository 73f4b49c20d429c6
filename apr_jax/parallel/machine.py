"""The name of the machine that a process runs on."""

import os
import platform

import jax


def device_name() -> str:
    """Return the name of the device that JAX computes on, and of its host's processor."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{jax.devices()[0].device_kind} ({machine})"
