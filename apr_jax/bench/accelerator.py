"""Checks of an accelerator against the CPU of its host: prefill, decode, attention, a step of SFT and one of GRPO.

The reference is the same program in float32 on a single CPU device. Models have the widths of the configuration's and
few layers. Each check says how far apart the two may be, and why.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from apr_jax.bench.agreement import agreement, decode_greedily, prefilled_threads, resumed_threads, sharp_params
from apr_jax.config import Config, ConfigError, MeshConfig, ModelConfig
from apr_jax.data.tokenizer import config_tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import RolloutKey
from apr_jax.kernels import for_training
from apr_jax.model.attention import xla_attention
from apr_jax.model.params import Params, init_params
from apr_jax.model.views.training import TrainingAttention
from apr_jax.parallel.mesh import BATCH_AXES, make_mesh, partition_spec
from apr_jax.reasoning.settings import banned_tokens
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.rl.advantage import normalised
from apr_jax.train.rl.sample import Scored
from apr_jax.train.rl.step_metrics import gap_metrics
from apr_jax.train.rl.update import Updater
from apr_jax.train.scorer import to_mesh
from apr_jax.train.sft import make_sft_step, normalise
from apr_jax.train.state import TrainState, create_state

Dtype = Literal["float32", "bfloat16"]
DecodeAttention = Literal["auto", "xla"]
Found = dict[str, float]

# Nats between log-probabilities, and relative distances of arrays. In float32 sums are taken in another order. In
# bfloat16 a number has 8 bits.
_NATS = {"float32": 2e-3, "bfloat16": 0.3}
_ARRAYS = {"float32": 1e-4, "bfloat16": 3e-2}
_GRADIENTS = {"float32": 2e-3, "bfloat16": 0.1}
_SUMS = "float32 sums differ in their order alone"
_REASONS = {
    "tokens": {
        "float32": f"{_SUMS}; wrong positions are off by several nats",
        "bfloat16": "at D=1024 and 4 layers bfloat16 was off by 0.07 nats at most on a CPU, wrong positions by 7.5",
    },
    "arrays": {
        "float32": f"{_SUMS}; a wrong mask moves a tenth of it or more",
        "bfloat16": "weights of values are rounded to 8 bits, an error below 1 %; a wrong mask moves a tenth or more",
    },
    "gradients": {
        "float32": f"{_SUMS}, through all layers and back",
        "bfloat16": "8 bits through all layers and back are some per cent; without a term half of it is missing",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A comparison with the CPU: `run` returns distances by name, each at most its tolerance."""

    name: str
    run: Callable[[], Found]
    tolerances: Found
    reason: str

    def row(self) -> dict[str, Any]:
        """Run, and describe what came out. Whatever is raised is a failure too."""
        began, found, error = time.perf_counter(), {}, None
        try:
            found = self.run()
        except Exception as raised:  # a check that cannot run must not stop the others
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:500]}"
        agrees = error is None and all(found[name] <= most for name, most in self.tolerances.items())
        row = {"agrees": agrees, "found": found, "tolerances": self.tolerances, "reason": self.reason}
        return row | {"seconds": time.perf_counter() - began} | ({} if error is None else {"error": error})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The devices that are checked, a CPU device to compare with, and a configuration that is small enough."""

    config: Config
    mesh: Mesh
    cpu: Mesh

    @classmethod
    def of(cls, config: Config, mesh: Mesh) -> "Subject":
        """Make the model shallow, and contexts short. Raises ConfigError where JAX has been told to use no CPU."""
        try:
            cpu = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices(backend="cpu")[:1])
        except RuntimeError as error:
            raise ConfigError(
                "there is no CPU to compare with, because JAX_PLATFORMS leaves it out; unset it, or add cpu to it"
            ) from error
        layers, longest = (1, 128) if mesh.devices.flat[0].platform == "cpu" else (4, 1_024)
        model = config.model
        model = dataclasses.replace(
            model, num_layers=min(layers, model.num_layers), max_seq_len=min(longest, model.max_seq_len), remat="none"
        )
        engine = dataclasses.replace(
            config.engine,
            lanes=8,
            pages=8 * -(-model.max_seq_len // config.engine.page_size) + 1,
            prefill_lanes=8,
            steps_per_visit=16,
        )
        small = dataclasses.replace(
            config,
            model=model,
            engine=engine,
            rollout=dataclasses.replace(
                config.rollout, max_steps=model.max_seq_len // 8, temperature=1.0, constrain_spawns=False
            ),
            lora=dataclasses.replace(config.lora, rank=0),
            grpo=dataclasses.replace(
                config.grpo,
                row_len=model.max_seq_len,
                inner_updates=1,
                kl_coef=0.0,
                optimizer=dataclasses.replace(config.grpo.optimizer, name="adamw", warmup_steps=0),
            ),
        )
        return cls(config=small, mesh=mesh, cpu=cpu)

    def model(self, dtype: Dtype) -> ModelConfig:
        return dataclasses.replace(self.config.model, compute_dtype=dtype)

    def on(self, mesh: Mesh, dtype: Dtype) -> Config:
        """Return the configuration for one of the meshes."""
        return dataclasses.replace(fitted(self.config, mesh, 1), model=self.model(dtype))


def fitted(config: Config, mesh: Mesh, rows_each: int) -> Config:
    """Return the configuration for a mesh: microbatches have so many rows for each row shard, and SFT's batch two."""
    rows = rows_each * num_rows(mesh)
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**{name: int(size) for name, size in mesh.shape.items()}),
        sft=dataclasses.replace(config.sft, rows_per_step=2 * rows, microbatches=2, validation_rows=rows),
        grpo=dataclasses.replace(config.grpo, rows_per_microbatch=rows),
    )


def num_rows(mesh: Mesh) -> int:
    """Return the rows of a batch that gives each row shard one."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def checks(subject: Subject) -> list[Check]:
    """Return all checks: the quick ones of single parts first, so that they explain what fails in a step."""
    own: Dtype = subject.config.model.compute_dtype
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    # Accelerators' kernels are for bfloat16; in float32 "auto" is "xla".
    decodes: list[tuple[DecodeAttention, Dtype]] = [("auto", "bfloat16"), ("xla", "bfloat16"), ("xla", "float32")]
    if subject.mesh.devices.flat[0].platform == "cpu":
        dtypes, decodes = (own,), [("auto", own)]
    return [
        *(_attention_check(subject, dtype) for dtype in dtypes),
        _tokens_check("prefill", subject, "auto", own),
        *(_tokens_check("decode", subject, attention, dtype) for attention, dtype in decodes),
        *(_sft_check(subject, dtype) for dtype in dtypes),
        _grpo_check(subject, own),
    ]


def _tokens_check(what: str, subject: Subject, attention: DecodeAttention, dtype: Dtype) -> Check:
    def run() -> Found:
        config = subject.on(subject.mesh, dtype)
        params = sharp_params(config.model, config.seed)
        script = prefilled_threads if what == "prefill" else resumed_threads
        sizes = dataclasses.replace(config.engine, decode_attention=attention)
        with _exactly(dtype):
            calls = decode_greedily(config.model, sizes, config.rollout, subject.mesh, params, config.seed, script)
        found = agreement(calls, config.model, params)
        return {
            "max_regret": found.max_regret,
            "max_difference": found.max_difference,
            "mean_difference": found.mean_difference,
            "tokens": float(found.num_tokens),
            "not_the_best": float(found.num_other),
        }

    most = _NATS[dtype]
    tolerances = {"max_regret": most, "max_difference": most, "mean_difference": most / 4}
    return Check(name=f"{what}, {attention} {dtype}", run=run, tolerances=tolerances, reason=_REASONS["tokens"][dtype])


def _attention_check(subject: Subject, dtype: Dtype) -> Check:
    def run() -> Found:
        model, mesh = subject.model(dtype), subject.mesh
        kernel = for_training(model, mesh.devices.flat[0].platform).attention
        rows = random_rows(num_rows(mesh), model, subject.config.seed)
        with _exactly(dtype):
            found = _attend(mesh, model, kernel, rows["segment_ids"], dtype)
        reference = _attend(subject.cpu, model, xla_attention, rows["segment_ids"], "float32", rounded_to=dtype)
        names = ("forward", "backward_queries", "backward_keys", "backward_values")
        return {name: distance([a], [b]) for name, a, b in zip(names, found, reference, strict=True)}

    most = _ARRAYS[dtype]
    tolerances = {"forward": most, "backward_queries": most, "backward_keys": most, "backward_values": most}
    return Check(name=f"training attention, {dtype}", run=run, tolerances=tolerances, reason=_REASONS["arrays"][dtype])


def _attend(
    mesh: Mesh,
    model: ModelConfig,
    attention: TrainingAttention,
    ids_BT: np.ndarray,
    dtype: Dtype,
    rounded_to: Dtype | None = None,
) -> list[np.ndarray]:
    """Return the outputs of tokens that are no padding, and the gradients of queries, keys and values."""
    (B, T), rng = ids_BT.shape, np.random.default_rng(0)
    rows = NamedSharding(mesh, partition_spec(BATCH_AXES))

    def draw(heads: int) -> Any:
        drawn = rng.standard_normal((B, T, heads, model.head_dim), np.float32)
        return jax.device_put(np.asarray(jnp.asarray(drawn, rounded_to or dtype).astype(dtype)), rows)

    q_BTNH, k_BTKH, v_BTKH = draw(model.num_heads), draw(model.num_kv_heads), draw(model.num_kv_heads)
    used_BT11 = (ids_BT > 0)[..., None, None]  # what padding attends to is nobody's business

    def loss(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array, target_BTNH: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, ids_BT, None) * used_BT11
        return jnp.sum((out_BTNH * target_BTNH).astype(jnp.float32)), out_BTNH

    @jax.jit
    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (_, out_BTNH), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return out_BTNH, *grads

    found = run(q_BTNH, k_BTKH, v_BTKH, jax.device_put(ids_BT, rows), draw(model.num_heads))
    return [np.asarray(x, np.float32) for x in jax.device_get(found)]


def _sft_check(subject: Subject, dtype: Dtype) -> Check:
    def run() -> Found:
        params = init_params(subject.config.model, subject.config.seed)
        rows = random_rows(num_rows(subject.mesh), subject.config.model, subject.config.seed)
        with _exactly(dtype):
            loss, gradient = _sft_step(subject.mesh, subject.on(subject.mesh, dtype), params, rows)
        expected, reference = _sft_step(subject.cpu, subject.on(subject.cpu, "float32"), params, rows)
        return {"loss": abs(loss - expected) / abs(expected), "gradient": distance(gradient, reference)}

    tolerances = {"loss": _GRADIENTS[dtype] / 10, "gradient": _GRADIENTS[dtype]}
    return Check(name=f"SFT step, {dtype}", run=run, tolerances=tolerances, reason=_REASONS["gradients"][dtype])


def _sft_step(
    mesh: Mesh, config: Config, params: Params, rows: dict[str, np.ndarray]
) -> tuple[float, list[np.ndarray]]:
    optimizer = make_optimizer(dataclasses.replace(config.sft.optimizer, name="adamw", warmup_steps=0), 1)
    step = make_sft_step(config.model, optimizer, lambda _: jnp.zeros(()), mesh)
    state = create_state(mesh, config.model, optimizer, jax.device_get(params))
    state, metrics = step(state, to_mesh(rows, mesh, 1))
    return float(metrics["loss"]), first_moments(state)


def _grpo_check(subject: Subject, dtype: Dtype) -> Check:
    def run() -> Found:
        config = subject.on(subject.mesh, dtype)
        params = sharp_params(config.model, config.seed)
        with _exactly(dtype):
            scored = _rollouts(subject.mesh, config, params)
            gradient, gap = _grpo_step(subject.mesh, config, params, scored)
        reference, _ = _grpo_step(subject.cpu, subject.on(subject.cpu, "float32"), params, scored)
        gaps = {name: gap[name] for name in ("logp_diff_mean", "logp_diff_max")}
        return {"gradient": distance(gradient, reference), **gaps}

    tolerances = {"gradient": _GRADIENTS[dtype], "logp_diff_mean": _NATS[dtype] / 4, "logp_diff_max": 4 * _NATS[dtype]}
    reason = (
        f"{_REASONS['gradients'][dtype]}; logp_diff compares rollout and trainer on the device, whose draws include "
        "improbable tokens"
    )
    return Check(name=f"GRPO step, {dtype}", run=run, tolerances=tolerances, reason=reason)


def _rollouts(mesh: Mesh, config: Config, params: Params) -> list[Scored]:
    """Sample groups of threads that stop and go on, half of which earn a reward."""
    banned = banned_tokens(config_tokenizer(config), config.model.vocab_size)
    engine = Engine(config.model, config.engine, config.rollout, mesh, params=params, banned_tokens=banned)
    group = config.grpo.group_size
    each = [resumed_threads(config.model, config.engine.page_size, config.rollout.max_steps, 0) for _ in range(group)]
    programs = [
        (RolloutKey(number, sample), program)
        for number, samples in enumerate(zip(*each, strict=True))
        for sample, program in enumerate(samples)
    ]
    rollouts = engine.run(programs, seed=config.seed, temperature=config.rollout.temperature)
    rewards = [float(index % 2) for index in range(len(rollouts))]
    return [
        Scored(None, rollout, reward > 0, reward, advantage, np.ones(len(rollout.calls)))
        for rollout, reward, advantage in zip(rollouts, rewards, normalised(config.grpo, rewards).tolist(), strict=True)
    ]


def _grpo_step(
    mesh: Mesh, config: Config, params: Params, scored: Sequence[Scored]
) -> tuple[list[np.ndarray], dict[str, float]]:
    updater = Updater(config, mesh, config_tokenizer(config))
    batches = updater.microbatches(updater.sequences(scored))
    state = create_state(mesh, config.model, updater.optimizer, jax.device_get(params))
    state, _, old = updater.update(state, batches, None)
    return first_moments(state), gap_metrics(batches, old, 0.0)


def random_rows(count: int, model: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Draw a batch of rows with three segments each, and padding after them; weights sum to 1."""
    T, rng = model.max_seq_len, np.random.default_rng(seed)
    lengths = (T // 2, T // 4, T // 8 + 1)
    ids_T = np.repeat((1, 2, 3, 0), (*lengths, T - sum(lengths))).astype(np.int32)
    positions_T = np.concatenate([np.arange(n) for n in (*lengths, T - sum(lengths))]).astype(np.int32)
    tokens_BT, targets_BT = rng.integers(0, model.vocab_size, (2, count, T)).astype(np.int32)
    ids_BT = np.tile(ids_T, (count, 1))
    return {
        "tokens": tokens_BT,
        "targets": targets_BT,
        "segment_ids": ids_BT,
        "positions": np.tile(positions_T, (count, 1)),
        "weights": normalise((ids_BT > 0).astype(np.float32)),
    }


def first_moments(state: TrainState) -> list[np.ndarray]:
    """Return AdamW's first moments, which after a first step are the clipped gradient times `1 - b1`."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [np.asarray(leaf) for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]


def distance(found: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Return the norm of the difference over the norm of the reference; NaN where something is NaN."""
    pairs = list(zip(found, reference, strict=True))
    apart = math.fsum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in pairs)
    return math.sqrt(apart / math.fsum(float(np.sum(np.square(b, dtype=np.float64))) for _, b in pairs))


def _exactly(dtype: Dtype) -> Any:
    """Return a context in which float32 products are of float32, where accelerators would round to fewer bits."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()
