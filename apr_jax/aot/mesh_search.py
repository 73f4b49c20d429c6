"""A search for the mesh that a config trains on best: all shapes that divide the devices, the promising ones first.

The estimate is arithmetic on sizes and takes microseconds; promising meshes are then compiled (`survey.py`).
"""

import dataclasses
import math
import re

from apr_jax.aot.peaks import Cost, Estimate
from apr_jax.bench.datasheets import Peaks
from apr_jax.config import Config, ConfigError, MeshConfig
from apr_jax.config_fields import BY_DEVICES
from apr_jax.model.params import num_params
from apr_jax.parallel.fit import fit
from apr_jax.train.recomputation import CHUNK, Recomputation, Remat, pass_bytes

_MASTER, _COMPUTE = 4, 2  # bytes of a weight: float32, and bfloat16 where it is multiplied and gathered
_MOMENTS = 2  # of Adam, float32
_REMATS: tuple[Remat, ...] = ("none", "dots", "full")  # the least that is recomputed first


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, the config fitted to it, and what an SFT step is estimated to take."""

    config: Config
    bytes_needed: int  # of one device in GRPO: state, gradients, activations, the reference, the engine
    estimate: Estimate  # of one SFT step

    @property
    def mesh(self) -> MeshConfig:
        return self.config.mesh


def shapes(num_devices: int) -> list[MeshConfig]:
    """Return every (data, fsdp, tensor) whose product is the number of devices."""
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    return [
        MeshConfig(data=num_devices // fsdp // tensor, fsdp=fsdp, tensor=tensor)
        for tensor in divisors
        for fsdp in divisors
        if num_devices % (fsdp * tensor) == 0
    ]


def parse_mesh(text: str, num_devices: int) -> MeshConfig:
    """Parse `DATA,FSDP,TENSOR`. Raises ConfigError for anything else, and for another number of devices."""
    parts = text.split(",")
    if len(parts) != 3 or not all(re.fullmatch("[1-9][0-9]{0,8}", part) for part in parts):
        raise ConfigError(f"--mesh={text}: give DATA,FSDP,TENSOR as three numbers above 0, such as {num_devices},1,1")
    data, fsdp, tensor = map(int, parts)
    if data * fsdp * tensor != num_devices:
        raise ConfigError(f"--mesh={text} has {data * fsdp * tensor} devices, and the topology has {num_devices}")
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def candidates(config: Config, num_devices: int, devices_per_host: int, peaks: Peaks) -> list[Candidate]:
    """Return every mesh that divides, fitted: those that seem to fit the memory first, then the faster first.

    Where a microbatch seems too large for the memory its rows are halved.
    """
    found = []
    for mesh in shapes(num_devices):
        try:
            fitted = fit(config, mesh, devices_per_host)
            candidate = estimate(fitted, peaks)
            rows = rows_per_shard(fitted)
            while candidate.bytes_needed > peaks.memory and rows > 1:
                rows //= 2
                candidate = estimate(fit(config, mesh, devices_per_host, rows), peaks)
        except ConfigError:  # it does not divide
            continue
        found.append(candidate)
    return sorted(found, key=lambda c: (c.bytes_needed > peaks.memory, c.estimate.seconds, c.mesh.tensor, c.mesh.fsdp))


def rows_per_shard(config: Config) -> int:
    """Count the rows of an SFT microbatch on one device."""
    return config.sft.rows_per_step // config.sft.microbatches // config.mesh.row_shards


def estimate(config: Config, peaks: Peaks) -> Candidate:
    """Estimate an SFT step on the config's mesh, by arithmetic; for `model.remat="auto"` with the least that fits.

    FLOPs are 6 a weight and token, 8 with full remat, and those of causal attention (Kaplan et al. 2020, section 2.1).
    Links are rings. Each microbatch gathers the layers' weights over "fsdp" twice and scatters their gradients once,
    reduces gradients over "data", and reduces two activations a layer over "tensor" in every pass, recomputation
    included.
    """
    remats = _REMATS if config.model.remat == "auto" else (config.model.remat,)
    found = [_estimate(config, remat, peaks) for remat in remats]
    return next((each for each in found if each.bytes_needed <= peaks.memory), found[-1])


def _estimate(config: Config, remat: Remat, peaks: Peaks) -> Candidate:
    model, sft, mesh = config.model, config.sft, config.mesh
    devices = mesh.data * mesh.fsdp * mesh.tensor
    weights = num_params(model).total - model.vocab_size * model.embed_dim * (not model.tie_embeddings)
    tokens = sft.rows_per_step * sft.row_len
    passes = 4 if remat == "full" else 3
    attention = 2 * model.num_layers * model.num_heads * model.head_dim * sft.row_len * tokens
    local_tokens = tokens // sft.microbatches // (mesh.data * mesh.fsdp)
    own_weights = num_params(model).total / mesh.tensor
    activations = local_tokens * model.embed_dim * _COMPUTE
    ring = {size: (size - 1) / size for size in (mesh.data, mesh.fsdp, mesh.tensor)}
    sent = sft.microbatches * (
        3 * own_weights * _COMPUTE * ring[mesh.fsdp]
        + 2 * own_weights / mesh.fsdp * _MASTER * ring[mesh.data]
        + 2 * passes * model.num_layers * activations * ring[mesh.tensor]
    )
    read = passes * own_weights * _COMPUTE * sft.microbatches + 3 * _MASTER * own_weights / mesh.fsdp
    moved = read + sft.microbatches * passes * 16 * model.num_layers * activations
    cost = Cost(flops=(2 * passes * weights * tokens + passes * attention) / devices, bytes=moved, sent=sent)
    share = num_params(model).total * _MASTER / (mesh.fsdp * mesh.tensor)
    passed = pass_bytes(model, local_tokens, mesh.fsdp, mesh.tensor, Recomputation(remat, CHUNK))
    state = 2 * share + _MOMENTS * share / mesh.data + share * (config.grpo.kl_coef > 0)
    return Candidate(
        config,
        bytes_needed=math.ceil(state + passed + _engine_bytes(config)),
        estimate=Estimate.of(cost, peaks),
    )


def _engine_bytes(config: Config) -> float:
    """Count the bytes of weights and pages on one device of a host's engine."""
    model, engine, mesh = config.model, config.engine, config.mesh
    least = model.max_seq_len // engine.page_size + 1  # where the memory that is left decides
    positions = (least if engine.pages == BY_DEVICES else engine.pages) * engine.page_size
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * positions
    return (num_params(model).total + cache) * _COMPUTE / mesh.tensor
