"""Every setting of apr_jax, as frozen dataclasses that check themselves. `config_dict.py` is the door to them.

The types of numbers name their ranges (`config_fields.py`). A class checks what its own fields must agree on, and
`config_checks.py` what spans several sections.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from apr_jax.config_checks import disagreements, futile
from apr_jax.config_fields import (
    Count,
    CountOrFit,
    Decay,
    Devices,
    DevicesOrAll,
    Epsilon,
    GroupSize,
    Layers,
    Length,
    Natural,
    Positive,
    Price,
    Processes,
    Range,
    Rate,
    Seed,
    Share,
    ShareAbove0,
    ShareBelow1,
    Temperature,
    Threshold,
    Weight,
    numbers_of,
)

_LONGEST_SHOWN = 120  # characters of a wrong value in a message


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the field and says what to do."""


class Section:
    """A dataclass of settings whose numbers lie in their ranges. `path` is its place in the configuration."""

    _prefix: ClassVar[str]  # of its fields' names in messages

    def __init_subclass__(cls, path: str | None = None) -> None:
        if path is not None:
            cls._prefix = f"{path}." if path else ""

    def __post_init__(self) -> None:
        for name, number, allowed in numbers_of(self):
            check_range(f"{self._prefix}{name}", number, allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(Section, path="model.rope_scaling"):
    """RoPE stretched for contexts longer than those of pretraining, as Llama 3.1 does it (arXiv 2407.21783, section 3).

    Frequencies whose wavelength is above `original_max_seq_len / low_frequency_factor` are divided by `factor`, those
    below `original_max_seq_len / high_frequency_factor` stay, and those between are interpolated.
    """

    factor: Weight
    low_frequency_factor: Weight
    high_frequency_factor: Weight
    original_max_seq_len: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.factor >= 1 and 0 < self.low_frequency_factor < self.high_frequency_factor):
            raise ConfigError(
                f"model.rope_scaling: factor={self.factor} must be at least 1, and low_frequency_factor="
                f"{self.low_frequency_factor} positive and below high_frequency_factor={self.high_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, path="model"):
    """A decoder of the Llama kind (RMSNorm, RoPE, SwiGLU, optional grouped-query attention)."""

    family: str  # in `apr_jax.model.families.FAMILIES`
    vocab_size: Count  # at least the tokenizer's; the rest is never produced
    num_layers: Layers
    embed_dim: Count
    mlp_dim: Count
    num_heads: Count
    num_kv_heads: Count  # num_heads = multi-head, fewer = grouped-query
    head_dim: Count
    max_seq_len: Length  # tokens of context a thread may hold
    rope_theta: Positive
    rope_scaling: RopeScaling | None
    rms_norm_eps: Epsilon
    tie_embeddings: bool
    compute_dtype: Literal["float32", "bfloat16"]  # weights stay float32
    # The training kernel; auto = the best of the backend.
    attention: Literal["auto", "cpu", "xla", "splash", "cudnn"]
    # What the backward pass of a layer recomputes: nothing, all but products and attention, or the layer. auto: on an
    # accelerator the least that fits its memory, on a CPU the layer.
    remat: Literal["auto", "none", "dots", "full"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(Section, path="task"):
    """The fields of every task's section; a task's own dataclass adds to them (`apr_jax/tasks/`)."""

    name: str  # in `apr_jax.tasks.TASKS`

    @property
    def windows(self) -> tuple[int, ...]:
        """The context windows that prompts of demonstrations name, in ascending order; none by default."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that demonstrations are taken from; none by default."""
        return ()

    def check(self, config: "Config") -> None:
        """Check what the section asks of others. Raises ConfigError with the two numbers that disagree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section, path="data"):
    """The demonstrations on disk and how they become training rows."""

    directory: str
    method: str  # the way of reasoning that is demonstrated and trained, in `apr_jax.reasoning.METHODS`
    tokenizer: str  # "builtin", or the path of a Hugging Face tokenizer.json
    add_marker_tokens: bool  # add the task's marks of spawns and joins to a tokenizer.json that lacks them as tokens
    encoding: Literal["lines", "whole"]  # what is encoded on its own: each line, or the whole text of a thread
    bos: Literal["auto", "none", "once", "twice"]  # before a prompt; auto: as the tokenizer or its chat template says
    chat_template: Literal["auto", "none"]  # auto: a prompt is a user's message, where the tokenizer has a template
    num_train: Count  # problems
    num_validation: Count
    num_test: Count
    num_test_unseen_targets: Count
    num_workers: Processes  # that generate, tokenise and, off CPUs, pack rows; the data do not depend on it
    condition_on_budget: bool  # prefix the prompt with its budget (Sub Call Budget / Token Budget)
    replay_weight: Weight  # loss weight of a solved thread's replay of its winning path, relative to other tokens
    children_share: Share  # share of the root's children without an answer that is learnt from; reference: 1
    loss_on_context: bool  # also learn the prompt and the joined text (the reference does in SFT)
    facts_share: ShareBelow1  # share of training tokens that are bare facts of the task (data/facts.py); reference: 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section, path="mesh"):
    """Devices per mesh axis; their product is the number of devices used.

    With `data=-1` it uses all devices (`parallel.mesh.make_mesh`), and `sft.microbatches` and
    `grpo.rows_per_microbatch` are those of one data shard (`parallel.fit`). Global batches stay what they are.
    """

    data: DevicesOrAll
    fsdp: Devices
    tensor: Devices

    @property
    def row_shards(self) -> int:
        """The shards of a batch's rows that the configuration is written for."""
        return max(1, self.data) * self.fsdp


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section, path="optimizer"):
    """AdamW, or Muon for the matrices with AdamW for the rest (optax.contrib.muon)."""

    name: Literal["adamw", "muon"]
    learning_rate: Rate  # AdamW's peak
    muon_learning_rate: Rate  # Muon's peak; read when name is "muon"
    schedule: Literal["constant", "cosine", "trapezoid"]
    warmup_steps: Natural
    initial_scale: Rate  # learning rate at step 0, as a share of the peak
    final_scale: Rate  # and at the last step (cosine, trapezoid)
    decay_steps: Natural  # trapezoid: the last so many steps fall linearly to final_scale
    b1: Decay
    b2: Decay
    weight_decay: Weight
    clip_norm: Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Section, path="lora"):
    """Low-rank adapters that SFT and GRPO train in place of a pretrained policy's weights (model/lora.py)."""

    rank: Natural  # 0: none, all weights are trained
    alpha: Weight  # adapters count alpha / rank times
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...]  # the matrices of each layer that have one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank and not (self.alpha and self.targets and len({*self.targets}) == len(self.targets)):
            raise ConfigError(
                f"lora.alpha={self.alpha} and lora.targets={self.targets}: with lora.rank={self.rank}, alpha must be "
                "above 0, and targets name at least one matrix and none twice"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(Section, path="sft"):
    """Supervised fine-tuning on demonstrations (paper section 4.2)."""

    num_steps: Natural
    rows_per_step: Count  # packed rows in a global batch
    row_len: Length  # tokens a row
    microbatches: Count  # gradient accumulation: rows_per_step is split so often
    number_waves: Weight  # amplitude at which fresh number tokens start as waves (train/number_waves.py); 0: at random
    optimizer: OptimizerConfig
    checkpoint_every: Count
    validate_every: Count
    validation_rows: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows_per_step % self.microbatches:
            raise ConfigError(
                f"sft.rows_per_step={self.rows_per_step} must be a multiple of sft.microbatches={self.microbatches}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Section, path="engine"):
    """The decode engine's sizes, each for one data shard, so that they suit any number of devices.

    `lanes=-1` and `pages=-1` follow the device's memory (`engine/sizes.py`). A run keeps what was chosen.
    """

    lanes: CountOrFit  # threads decoded together
    pages: CountOrFit  # pages of KV cache, one of them reserved
    page_size: Count  # tokens a page
    steps_per_visit: Count  # tokens decoded on device between two visits of the host
    prefill_lanes: Count  # threads prefilled together; each advances up to one page a call
    decode_attention: Literal["auto", "xla"]  # the platform's kernel where there is one, or XLA
    page_dtype: Literal["compute", "int8"]  # of pages: the model's compute dtype, or 8 bits with a scale a head
    prefix_reuse: bool  # threads whose prompts begin alike share those pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section, path="rollout"):
    """Limits on one rollout, and its sampling."""

    max_steps: Count  # tokens one thread may generate
    context_window: Natural  # of task.context_windows: what threads are told and held to; 0 = the largest
    max_children: Count  # children one spawn may open
    max_spawns: Natural  # spawns one thread may make
    max_depth: Natural  # levels of threads below the root
    max_total_children: Count  # children in the whole tree of one rollout
    max_total_tokens: Count  # tokens that all threads of one rollout may generate
    budget: Natural  # named in prompts where data.condition_on_budget; 0: the most that the limits here allow
    temperature: Temperature  # GRPO's sampling temperature
    top_k: Natural  # draw from the k most probable tokens; 0: from all
    top_p: ShareAbove0  # of those, from the fewest that hold this share of their probability; 1: from all
    min_p: Share  # of those, from what has this share of the first one's probability; 0: from all
    cancel_on_success: bool  # the first child that reaches the goal ends its siblings
    constrain_spawns: bool  # a thread can only write well-formed spawns within the limits above; reference: False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeOfThoughtsConfig(Section, path="tree_of_thoughts"):
    """The search of the method tree_of_thoughts (reasoning/tree_of_thoughts.py)."""

    search: Literal["breadth_first", "depth_first"]
    breadth: Count  # breadth first: states that a level keeps
    value_samples: Count  # verdicts on a state, whose values are summed (sure 20, likely 1, impossible 0.001)
    threshold: Threshold  # depth first: a state is gone on from only where its value is above this


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Section, path="grpo.reward"):
    """The reward of a rollout (train/rl/reward.py): 1 for a right answer, less the prices of tokens and threads."""

    sequential_token_price: Price  # of a token on the longest causal chain, the engine's measured critical path
    token_price: Price  # of a token of any thread
    thread_price: Price  # of a child thread that wrote something
    failures_pay: bool  # False: no reward is below 0, so that failing cheaply earns no more than failing


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(Section, path="grpo"):
    """Group-relative policy optimisation (paper section 4.3) and its relatives."""

    objective: str  # grpo, dr_grpo, dapo, gspo, cispo, or your own: a name in train/rl/objective.py
    num_steps: Natural
    prompts_per_step: Count
    group_size: GroupSize  # rollouts a prompt; advantages are relative to their mean
    overlap: Natural  # next steps whose rollouts are drawn along with a step's: they fill its last lanes, off-policy
    max_resamples: Natural  # how often a step may replace groups without signal by new problems (DAPO); 0 = keep them
    inner_updates: Count  # optimiser steps on one set of rollouts
    clip_ratio: Weight  # how far a ratio may fall below 1
    clip_ratio_high: Weight  # how far it may rise above 1; GRPO: the same, DAPO: more
    kl_coef: Weight  # weight of the k3 estimate of KL(policy || reference); 0 needs no reference
    advantage_eps: Share  # added to a group's standard deviation
    length_normaliser: Count  # Dr. GRPO's constant: tokens that a rollout's summed loss is divided by
    importance_cap: Weight  # truncated importance weight for the rollout/trainer gap; 0 = off
    credit: Literal["rollout", "used"]  # who has the rollout's advantage: every call, or see train/rl/credit.py
    reward: RewardConfig
    row_len: Length
    rows_per_microbatch: Count
    optimizer: OptimizerConfig
    checkpoint_every: Count
    validate_every: (
        Natural  # steps between evaluations on the validation split, which choose the best checkpoint; 0: none
    )
    validation_problems: Count  # problems in one, decoded greedily


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig(Section, path="faults"):
    """Settings against faults: the checkpoints that are kept, and the skipped steps after which a run gives up."""

    keep_checkpoints: Count  # the newest of a phase; the best by validation stays besides
    max_skipped_steps: Count  # a run stops after so many steps in a row of which something was not finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section, path="evaluation"):
    """Held-out problems and how they are decoded."""

    split: Literal["validation", "test", "test_unseen_targets"]
    num_problems: Count
    temperature: Temperature
    also_temperature: Temperature  # a second pass at this temperature stands beside the first in summary.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section, path=""):
    """One run."""

    name: str
    seed: Seed
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    mesh: MeshConfig
    lora: LoraConfig
    sft: SFTConfig
    engine: EngineConfig
    rollout: RolloutConfig
    tree_of_thoughts: TreeOfThoughtsConfig
    grpo: GRPOConfig
    faults: FaultsConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        for disagreement in disagreements(self):
            raise ConfigError(disagreement)
        self.task.check(self)


def check_run(config: Config) -> None:
    """Raise ConfigError for a training run that would fail late, or do something in vain (`config_checks.futile`)."""
    for fault in futile(config):
        raise ConfigError(fault)


def check_choice(field: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ConfigError, with the likeliest choice, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        close = difflib.get_close_matches(shown(value), [str(c) for c in choices], n=1, cutoff=0.3)
        raise ConfigError(
            f"{field}={shown(value)}: choose one of {', '.join(map(repr, choices))}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )


def check_range(field: str, value: float, allowed: Range) -> None:
    """Raise ConfigError unless a number lies in its range, which no infinity and no NaN does."""
    fault = allowed.fault(value)
    if fault:
        raise ConfigError(f"{field}={shown(value)}{fault}")


def shown(value: Any) -> str:
    """Return any value as a message writes it, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}.."
