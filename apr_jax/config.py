"""Every setting of apr_jax, as frozen dataclasses that check themselves. `config_dict.py` is the door to them."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the field and says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE stretched for contexts longer than those of pretraining, as Llama 3.1 does it (arXiv 2407.21783, section 3).

    Frequencies whose wavelength is above `original_max_seq_len / low_frequency_factor` are divided by `factor`, those
    below `original_max_seq_len / high_frequency_factor` stay, and those between are interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        positive(self, "model.rope_scaling", "original_max_seq_len")
        if not (self.factor >= 1 and 0 < self.low_frequency_factor < self.high_frequency_factor):
            raise ConfigError(
                f"model.rope_scaling: factor={self.factor} must be at least 1, and low_frequency_factor="
                f"{self.low_frequency_factor} positive and below high_frequency_factor={self.high_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama kind (RMSNorm, RoPE, SwiGLU, optional grouped-query attention)."""

    family: str  # in `apr_jax.model.families.FAMILIES`
    vocab_size: int  # at least the tokenizer's; the rest is never produced
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int  # num_heads = multi-head, fewer = grouped-query
    head_dim: int
    max_seq_len: int  # tokens of context a thread may hold
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_embeddings: bool
    compute_dtype: Literal["float32", "bfloat16"]  # weights stay float32
    # The training kernel; auto = the best of the backend.
    attention: Literal["auto", "cpu", "xla", "splash", "cudnn"]
    # What the backward pass of a layer recomputes: nothing, all but products and attention, or the whole layer.
    remat: Literal["none", "dots", "full"]

    def __post_init__(self) -> None:
        positive(self, "model", "vocab_size num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim max_seq_len")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The fields of every task's section; a task's own dataclass adds to them (`apr_jax/tasks/`)."""

    name: str  # in `apr_jax.tasks.TASKS`

    @property
    def windows(self) -> tuple[int, ...]:
        """The context windows that prompts of demonstrations name, in ascending order; none by default."""
        return ()

    def check(self, config: "Config") -> None:
        """Check what the section asks of others. Raises ConfigError with the two numbers that disagree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The demonstrations on disk and how they become training rows."""

    directory: str
    method: str  # the way of reasoning that is demonstrated and trained, in `apr_jax.reasoning.METHODS`
    tokenizer: str  # "builtin", or the path of a Hugging Face tokenizer.json
    num_train: int  # problems
    num_validation: int
    num_test: int
    num_test_unseen_targets: int
    num_workers: int  # processes that generate; the data do not depend on it
    condition_on_budget: bool  # prefix the prompt with its budget (Sub Call Budget / Token Budget)
    replay_weight: float  # loss weight of a solved thread's replay of its winning path, relative to other tokens
    loss_on_context: bool  # also learn the prompt and the joined text (the reference does in SFT)
    facts_share: float  # share of training tokens that are bare facts of the task (data/facts.py); reference: 0

    def __post_init__(self) -> None:
        positive(self, "data", "num_train num_validation num_test num_test_unseen_targets num_workers")
        if not 0 <= self.facts_share < 1:
            raise ConfigError(f"data.facts_share={self.facts_share} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; their product is the number of devices used."""

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        positive(self, "mesh", "data fsdp tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices with AdamW for the rest (optax.contrib.muon)."""

    name: Literal["adamw", "muon"]
    learning_rate: float  # AdamW's peak
    muon_learning_rate: float  # Muon's peak; read when name is "muon"
    schedule: Literal["constant", "cosine", "trapezoid"]
    warmup_steps: int
    initial_scale: float  # learning rate at step 0, as a share of the peak
    final_scale: float  # and at the last step (cosine, trapezoid)
    decay_steps: int  # trapezoid: the last so many steps fall linearly to final_scale
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        not_negative(self, "optimizer", "warmup_steps decay_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations (paper section 4.2)."""

    num_steps: int
    rows_per_step: int  # packed rows in a global batch
    row_len: int  # tokens a row
    microbatches: int  # gradient accumulation: rows_per_step is split so often
    number_waves: float  # amplitude at which fresh number tokens start as waves (train/number_waves.py); 0: at random
    optimizer: OptimizerConfig
    checkpoint_every: int
    validate_every: int
    validation_rows: int

    def __post_init__(self) -> None:
        positive(self, "sft", "rows_per_step row_len microbatches checkpoint_every validate_every validation_rows")
        if self.rows_per_step % self.microbatches:
            raise ConfigError(
                f"sft.rows_per_step={self.rows_per_step} must be a multiple of sft.microbatches={self.microbatches}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The decode engine's sizes, each for one data shard, so that they suit any number of devices."""

    lanes: int  # threads decoded together
    pages: int  # pages of KV cache, one of them reserved
    page_size: int  # tokens a page
    steps_per_visit: int  # tokens decoded on device between two visits of the host
    prefill_lanes: int  # threads prefilled together; each advances up to one page a call
    decode_attention: Literal["auto", "xla"]  # the platform's kernel where there is one, or XLA
    prefix_reuse: bool  # threads whose prompts begin alike share those pages

    def __post_init__(self) -> None:
        positive(self, "engine", "lanes pages page_size steps_per_visit prefill_lanes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Limits on one rollout, and its sampling."""

    max_steps: int  # tokens one thread may generate
    context_window: int  # of task.context_windows: what threads are told and held to; 0 = the largest
    max_children: int  # children one spawn may open
    max_spawns: int  # spawns one thread may make
    max_depth: int  # levels of threads below the root
    max_total_children: int  # children in the whole tree of one rollout
    max_total_tokens: int  # tokens that all threads of one rollout may generate
    temperature: float  # GRPO's sampling temperature
    cancel_on_success: bool  # the first child that reaches the goal ends its siblings
    constrain_spawns: bool  # a thread can only write well-formed spawns within the limits above; reference: False

    def __post_init__(self) -> None:
        positive(self, "rollout", "max_steps max_children max_total_children max_total_tokens")
        if self.temperature < 0:
            raise ConfigError(f"rollout.temperature={self.temperature} must be >= 0 (0 is greedy)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeOfThoughtsConfig:
    """The search of the method tree_of_thoughts (reasoning/tree_of_thoughts.py)."""

    search: Literal["breadth_first", "depth_first"]
    breadth: int  # breadth first: states that a level keeps
    value_samples: int  # verdicts on a state, whose values are summed (sure 20, likely 1, impossible 0.001)
    threshold: float  # depth first: a state is gone on from only where its value is above this

    def __post_init__(self) -> None:
        positive(self, "tree_of_thoughts", "breadth value_samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward of a rollout (train/rl/reward.py): 1 for a right answer, less the prices of tokens and threads."""

    sequential_token_price: float  # of a token on the longest causal chain, the engine's measured critical path
    token_price: float  # of a token of any thread
    thread_price: float  # of a child thread that wrote something
    failures_pay: bool  # False: no reward is below 0, so that failing cheaply earns no more than failing

    def __post_init__(self) -> None:
        for field in ("sequential_token_price", "token_price", "thread_price"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(f"grpo.reward.{field}={getattr(self, field)} must be a number >= 0 (0 is free)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group-relative policy optimisation (paper section 4.3) and its relatives."""

    objective: str  # grpo, dr_grpo, dapo, gspo, cispo, or your own: a name in train/rl/objective.py
    num_steps: int
    prompts_per_step: int
    group_size: int  # rollouts a prompt; advantages are relative to their mean
    max_resamples: int  # how often a step may replace groups without signal by new problems (DAPO); 0 = keep them
    inner_updates: int  # optimiser steps on one set of rollouts
    clip_ratio: float  # how far a ratio may fall below 1
    clip_ratio_high: float  # how far it may rise above 1; GRPO: the same, DAPO: more
    kl_coef: float  # weight of the k3 estimate of KL(policy || reference); 0 needs no reference
    advantage_eps: float  # added to a group's standard deviation
    length_normaliser: int  # Dr. GRPO's constant: tokens that a rollout's summed loss is divided by
    importance_cap: float  # truncated importance weight for the rollout/trainer gap; 0 = off
    credit: Literal["rollout", "used"]  # who has the rollout's advantage: every call, or see train/rl/credit.py
    reward: RewardConfig
    row_len: int
    rows_per_microbatch: int
    optimizer: OptimizerConfig
    checkpoint_every: int
    validate_every: int  # steps between evaluations on the validation split, which choose the best checkpoint; 0: none
    validation_problems: int  # problems in one, decoded greedily

    def __post_init__(self) -> None:
        not_negative(self, "grpo", "max_resamples clip_ratio clip_ratio_high kl_coef advantage_eps importance_cap")
        not_negative(self, "grpo", "validate_every")
        positive(self, "grpo", "prompts_per_step group_size inner_updates row_len rows_per_microbatch checkpoint_every")
        positive(self, "grpo", "length_normaliser validation_problems")
        if self.group_size < 2:
            raise ConfigError(f"grpo.group_size={self.group_size}: an advantage needs at least 2 rollouts a prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Settings against faults: the checkpoints that are kept, and the skipped steps after which a run gives up."""

    keep_checkpoints: int  # the newest of a phase; the best by validation stays besides
    max_skipped_steps: int  # a run stops after so many steps in a row whose loss or gradient was not finite

    def __post_init__(self) -> None:
        positive(self, "faults", "keep_checkpoints max_skipped_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out problems and how they are decoded."""

    split: Literal["validation", "test", "test_unseen_targets"]
    num_problems: int
    temperature: float
    also_temperature: float  # a second pass at this temperature stands beside the first in summary.json

    def __post_init__(self) -> None:
        positive(self, "evaluation", "num_problems")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    name: str
    seed: int
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    mesh: MeshConfig
    sft: SFTConfig
    engine: EngineConfig
    rollout: RolloutConfig
    tree_of_thoughts: TreeOfThoughtsConfig
    grpo: GRPOConfig
    faults: FaultsConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        check_consistent(self)


def check_consistent(config: Config) -> None:
    """Check what spans several sections. Raise ConfigError with the two numbers that disagree."""
    model, engine, mesh = config.model, config.engine, config.mesh
    pages_per_thread = -(-model.max_seq_len // engine.page_size)
    batch_shards = mesh.data * mesh.fsdp
    if engine.pages - 1 < pages_per_thread:
        raise ConfigError(
            f"engine.pages={engine.pages} leaves {engine.pages - 1} usable pages a data shard, and one thread of "
            f"model.max_seq_len={model.max_seq_len} tokens needs {pages_per_thread} of "
            f"engine.page_size={engine.page_size}"
        )
    for name, row_len in (("sft", config.sft.row_len), ("grpo", config.grpo.row_len)):
        if row_len < model.max_seq_len:
            raise ConfigError(
                f"{name}.row_len={row_len} is shorter than model.max_seq_len={model.max_seq_len}: "
                "a full thread would not fit a row"
            )
    for field, value in (
        ("num_kv_heads", model.num_kv_heads),
        ("num_heads", model.num_heads),
        ("mlp_dim", model.mlp_dim),
    ):
        if value % mesh.tensor:
            raise ConfigError(f"model.{field}={value} must be a multiple of mesh.tensor={mesh.tensor}")
    if model.embed_dim % mesh.fsdp:
        raise ConfigError(f"model.embed_dim={model.embed_dim} must be a multiple of mesh.fsdp={mesh.fsdp}")
    _check_windows(config)
    config.task.check(config)
    if config.grpo.validate_every and config.grpo.validation_problems > config.data.num_validation:
        raise ConfigError(
            f"grpo.validation_problems={config.grpo.validation_problems} is more than "
            f"data.num_validation={config.data.num_validation}"
        )
    most_prompts = config.grpo.prompts_per_step * (1 + config.grpo.max_resamples)
    if config.grpo.max_resamples and most_prompts > config.data.num_train:
        raise ConfigError(
            f"grpo.max_resamples={config.grpo.max_resamples} may ask for {most_prompts} problems in a step, and "
            f"data.num_train={config.data.num_train}"
        )
    rows = config.sft.rows_per_step // config.sft.microbatches
    for field, value in (
        ("sft.rows_per_step / sft.microbatches", rows),
        ("sft.validation_rows", config.sft.validation_rows),
        ("grpo.rows_per_microbatch", config.grpo.rows_per_microbatch),
    ):
        if value % batch_shards:
            raise ConfigError(f"{field}={value} must be a multiple of mesh.data * mesh.fsdp = {batch_shards}")


def _check_windows(config: Config) -> None:
    windows, window, longest = config.task.windows, config.rollout.context_window, config.model.max_seq_len
    if windows and windows[-1] > longest:
        raise ConfigError(f"task.context_windows={windows} holds one above model.max_seq_len={longest}")
    if window not in (0, *windows):
        raise ConfigError(
            f"rollout.context_window={window} must be 0 or one of task.context_windows={windows}, "
            "which demonstrations name"
        )


def check_choice(field: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ConfigError, with the likeliest choice, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        close = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.3)
        raise ConfigError(
            f"{field}={value!r}: choose one of {', '.join(map(repr, choices))}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )


def positive(section: Any, name: str, fields: str) -> None:
    """Raise ConfigError unless each of the fields is at least 1."""
    for field in fields.split():
        if getattr(section, field) < 1:
            raise ConfigError(f"{name}.{field}={getattr(section, field)} must be at least 1")


def not_negative(section: Any, name: str, fields: str) -> None:
    """Raise ConfigError unless each of the fields is at least 0."""
    for field in fields.split():
        if getattr(section, field) < 0:
            raise ConfigError(f"{name}.{field}={getattr(section, field)} must be at least 0")


def share(section: Any, name: str, fields: str) -> None:
    """Raise ConfigError unless each of the fields lies in [0, 1]."""
    for field in fields.split():
        if not 0 <= getattr(section, field) <= 1:
            raise ConfigError(f"{name}.{field}={getattr(section, field)} must lie in [0, 1]")
