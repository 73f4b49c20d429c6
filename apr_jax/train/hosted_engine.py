"""The engine of a run. In a job each host has its own, and together they look like one."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from apr_jax.config import Config, ModelConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.constraints import Masks
from apr_jax.engine.engine import Engine
from apr_jax.engine.plan import EnginePlan
from apr_jax.engine.threads import Call, Program, Progress, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.evaluation.run import RunsPrograms
from apr_jax.model.params import Params, abstract_params, logical_axes
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import RULES, param_shardings
from apr_jax.progress import busy
from apr_jax.reasoning.base import Outcome, Sample
from apr_jax.reasoning.policy_engine import EngineHolder, HeldEngine, policy_engine, workers
from apr_jax.stopping import StopSignal

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


def plan_engine(config: Config, mesh: Mesh) -> EnginePlan:
    """Plan each host's engine. Raises ConfigError for sizes that don't divide, or don't fit a device."""
    return EnginePlan.of(config.model, config.engine, hosts.rollout_mesh(mesh), *workers(config))


def make_engine(config: Config, mesh: Mesh, tokenizer: Tokenizer, params: Params, stop: StopSignal) -> RolloutEngine:
    """Make an engine for a trainer that works on `mesh`, where `params` lie. Raises ConfigError as `plan_engine`."""

    def on_this_host(params: Params) -> Engine:
        return policy_engine(config, hosts.rollout_mesh(mesh), tokenizer, params)

    if jax.process_count() == 1:
        return on_this_host(params)
    shapes = abstract_params(config.model)
    whole_over_fsdp = dataclasses.replace(RULES, embed=None)
    localise = hosts.Localiser(mesh, param_shardings(mesh, shapes, logical_axes(shapes), whole_over_fsdp))
    return HostedEngine(on_this_host(localise(params)), localise, stop)


class HostedEngine:
    """An engine of several hosts: each host's own runs a share of the programs, and every host gets all rollouts.

    A rollout depends on weights, seed, temperature, its key and its program only (`Engine.run`), so it is the same on
    whichever host it runs.
    """

    def __init__(self, engine: Engine, localise: Callable[[Any], Any], stop: StopSignal) -> None:
        """Take this host's engine, which holds its first parameters.

        Args:
          localise: brings parameters from the job's mesh to the engine's.
        """
        self._engine, self._localise, self._stop = engine, localise, stop

    @property
    def model(self) -> ModelConfig:
        """The model that every host decodes with."""
        return self._engine.model

    def set_params(self, params: Params) -> None:
        """Take new weights from the job's mesh. All hosts call it."""
        self._engine.set_params(self._localise(params))

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
