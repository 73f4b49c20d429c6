"""The engine of a run. In a job each host has its own, and together they look like one."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from apr_jax.config import Config, ConfigError, EngineConfig, ModelConfig
from apr_jax.config_fields import BY_DEVICES
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.constraints import Masks
from apr_jax.engine.engine import Engine
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.sizes import BESIDE_A_TRAINER
from apr_jax.engine.threads import Call, Program, Progress, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.evaluation.run import RunsPrograms
from apr_jax.model.params import Params
from apr_jax.parallel import hosts
from apr_jax.progress import busy
from apr_jax.reasoning.base import Outcome, Sample
from apr_jax.reasoning.policy_engine import EngineHolder, HeldEngine, policy_engine, workers
from apr_jax.stopping import StopSignal
from apr_jax.train.memory import trainer_bytes

NOTHING_CHOSEN: Mapping[str, Any] = MappingProxyType({})
ROLLOUT_TYPES = (Rollout, RolloutKey, Call, Stop, StopReason, Masks, Work, Outcome, Sample)  # all that one is made of


class RolloutEngine(RunsPrograms, HeldEngine, Protocol):
    """An engine that runs programs and takes new weights between runs."""


class RunEngine:
    """The one engine of a run, compiled once for all stages. The trainer works on `mesh`."""

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer, stop: StopSignal) -> None:
        self._config, self._mesh, self._tokenizer, self._stop = config, mesh, tokenizer, stop
        self._holder: EngineHolder[RolloutEngine] = EngineHolder()

    def holding(self, params: Params) -> RolloutEngine:
        """Return the engine with these weights, which lie on the trainer's mesh. Raises as `make_engine`."""

        def make() -> RolloutEngine:
            return make_engine(self._config, self._mesh, self._tokenizer, params, self._stop)

        with self._stop.interrupting(), busy("Compiling the engine", hosts.messages()):
            return self._holder.get("run", make, params)


def plan_engine(config: Config, mesh: Mesh, chosen: Mapping[str, Any] = NOTHING_CHOSEN) -> EnginePlan:
    """Plan each host's engine, beside the trainer on `mesh`.

    Args:
      chosen: lanes and pages of the run so far. Those that the configuration leaves to the devices stay, where they
        fit these.
    Raises: ConfigError for sizes that don't divide, or don't fit a device.
    """

    def plan(sizes: EngineConfig) -> EnginePlan:
        place, beside = hosts.rollout_mesh(mesh), trainer_bytes(config, mesh)
        return EnginePlan.of(config.model, sizes, place, *workers(config), beside=beside, share=BESIDE_A_TRAINER)

    open_sizes = [name for name in ("lanes", "pages") if getattr(config.engine, name) == BY_DEVICES]
    if open_sizes and all(type(chosen.get(name)) is int for name in open_sizes):
        with contextlib.suppress(ConfigError):  # the run goes on on smaller devices
            return plan(dataclasses.replace(config.engine, **{name: chosen[name] for name in open_sizes}))
    return plan(config.engine)


def make_engine(config: Config, mesh: Mesh, tokenizer: Tokenizer, params: Params, stop: StopSignal) -> RolloutEngine:
    """Make an engine for a trainer that works on `mesh`, where `params` lie. Raises ConfigError as `plan_engine`."""

    engine = policy_engine(config, hosts.rollout_mesh(mesh), tokenizer, params)
    return engine if jax.process_count() == 1 else HostedEngine(engine, stop)


class HostedEngine:
    """An engine of several hosts: each host's own runs a share of the programs, and every host gets all rollouts.

    A rollout depends on weights, seed, temperature, its key and its program only (`Engine.run`), so it is the same on
    whichever host it runs.
    """

    def __init__(self, engine: Engine, stop: StopSignal) -> None:
        """Take this host's engine, which holds its first parameters."""
        self._engine, self._stop = engine, stop

    @property
    def model(self) -> ModelConfig:
        """The model that every host decodes with."""
        return self._engine.model

    def set_params(self, params: Params) -> None:
        """Take new weights from the job's mesh. All hosts call it."""
        self._engine.set_params(params)

    def warm_up(self) -> float:
        """Compile all that runs will use. Returns the seconds it took."""
        return self._engine.warm_up()

    def run(
        self,
        programs: Sequence[tuple[RolloutKey, Program]],
        *,
        seed: int,
        temperature: float,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Rollout]:
        """Run programs as `Engine.run` does. All hosts call it, with the same programs.

        Progress is this host's, scaled up to all.

        Raises StoppedError on every host when any of them was asked to stop.
        """
        mine = hosts.own_part(programs)

        def show(now: Progress) -> None:
            self._stop.listen()
            if on_progress is not None:
                done = now.finished * len(programs) // len(mine)
                tokens = now.generated_tokens * len(programs) // len(mine)
                on_progress(Progress(done, len(programs), tokens, now.seconds))

        def run_mine() -> list[Rollout]:
            return self._engine.run(mine, seed=seed, temperature=temperature, on_progress=show)

        begin = time.perf_counter()
        rollouts = [rollout for theirs in self._stop.together(run_mine, ROLLOUT_TYPES) for rollout in theirs]
        if on_progress is not None:
            tokens = sum(len(call.tokens) for rollout in rollouts for call in rollout.calls)
            on_progress(Progress(len(rollouts), len(rollouts), tokens, time.perf_counter() - begin))
        return rollouts
