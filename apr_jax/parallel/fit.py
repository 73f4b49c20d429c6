"""Fits a configuration to a mesh that it was not written for: what a device does stays, and so do global batches."""

import dataclasses

from jax.sharding import Mesh

from apr_jax.config import Config, ConfigError, MeshConfig
from apr_jax.config_fields import BY_DEVICES


def fit_to(config: Config, mesh: Mesh) -> Config:
    """Return the config with the sizes that it has on a mesh made for it (`make_mesh`).

    Raises ConfigError as `fit`.
    """
    if config.mesh.data != BY_DEVICES:
        return config
    return fit(config, MeshConfig(**mesh.shape))


def fit(
    config: Config, mesh: MeshConfig, devices_per_host: int | None = None, rows_per_shard: int | None = None
) -> Config:
    """Fit the config to another mesh: sizes per device and the global batch of SFT stay what they are.

    Rows of a microbatch grow with the shards that they are split over; the number of microbatches falls.

    Args:
        devices_per_host: each host has an engine of its own, whose weights are split over "tensor" within it; None to
            leave that unchecked.
        rows_per_shard: of SFT, in a microbatch; what the config has on its own mesh by default.

    Raises ConfigError, with the numbers, for a mesh that does not divide the batch or a host.
    """
    if devices_per_host is not None and devices_per_host % mesh.tensor:
        raise ConfigError(
            f"mesh.tensor={mesh.tensor} must divide the {devices_per_host} devices of a host: each host has an engine "
            "of its own"
        )
    sft, grpo = config.sft, config.grpo
    shards, before = mesh.row_shards, config.mesh.row_shards
    if sft.rows_per_step % shards:
        fewer = next((n for n in range(mesh.data, 0, -1) if sft.rows_per_step % (n * mesh.fsdp) == 0), None)
        advice = "" if fewer is None else f"; set mesh.data={fewer}, or another sft.rows_per_step"
        raise ConfigError(
            f"sft.rows_per_step={sft.rows_per_step} must be a multiple of mesh.data * mesh.fsdp={shards}{advice}"
        )
    rows = (rows_per_shard or max(1, sft.rows_per_step // sft.microbatches // before)) * shards
    while sft.rows_per_step % rows:
        rows -= shards
    return dataclasses.replace(
        config,
        mesh=mesh,
        sft=dataclasses.replace(sft, microbatches=sft.rows_per_step // rows),
        grpo=dataclasses.replace(grpo, rows_per_microbatch=max(1, grpo.rows_per_microbatch // before) * shards),
    )
