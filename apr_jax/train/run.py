"""One run from nothing to a report: data, SFT, evaluation, GRPO, evaluation. Every stage is resumable and done once.

WORKDIR/config.json         the configuration
WORKDIR/engine.json         the engine's sizes, with those that the devices decided
WORKDIR/metrics.jsonl       one object a step (train/metrics.py)
WORKDIR/checkpoints/        checkpoints/manager.py
WORKDIR/evaluations/        one file for each evaluation that is done (train/evaluations.py)
WORKDIR/grpo_rollouts/      some rollouts that GRPO learnt from, with their advantages (train/rl/kept_rollouts.py)
WORKDIR/skipped/            batches of steps that were not finite, of a run that gave up (train/skipping.py)
WORKDIR/summary.json, rollouts.jsonl, report.html, figure.svg
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.checkpoints.best import mend_scores
from apr_jax.checkpoints.integrity import CheckpointError
from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.checkpoints.phases import PhaseName
from apr_jax.checkpoints.policy import check_finite
from apr_jax.checkpoints.reference import (
    forget_reference,
    has_reference,
    load_reference,
    reference_damage,
    save_reference,
    set_reference_aside,
)
from apr_jax.checkpoints.step_log import read_step_log
from apr_jax.config import Config, ConfigError, check_run
from apr_jax.config_dict import to_dict
from apr_jax.data import demonstrations
from apr_jax.data.demonstrations import DemonstrationSource
from apr_jax.data.facts import Facts
from apr_jax.data.pipeline import SequenceOptions, train_iterator, validation_batch
from apr_jax.data.token_store import TokenStore
from apr_jax.data.tokenized import Calls
from apr_jax.data.tokenizer import Tokenizer, config_tokenizer
from apr_jax.evaluation.policy import check_spelling, check_vocabulary
from apr_jax.evaluation.report.run_report import write_figure, write_report
from apr_jax.evaluation.run import load_problems
from apr_jax.files import naming, read_json, write_json
from apr_jax.model.params import Params, init_params, weights_digest
from apr_jax.model.placement import abstract_params_on, place_params
from apr_jax.parallel import hosts
from apr_jax.parallel.fit import fit_to
from apr_jax.parallel.mesh import make_mesh
from apr_jax.progress import Progress, busy, progress
from apr_jax.reasoning import METHODS
from apr_jax.stopping import StopSignal
from apr_jax.tasks import task_of
from apr_jax.tasks.base import split_size
from apr_jax.tasks.generation import draw_splits
from apr_jax.train.evaluations import Evaluations
from apr_jax.train.grpo import train_grpo
from apr_jax.train.hosted_engine import RunEngine, plan_engine
from apr_jax.train.metrics import MetricsWriter
from apr_jax.train.number_waves import check_width, with_number_waves
from apr_jax.train.origins import Given, Origins, load_given
from apr_jax.train.phase import METRICS_CRC, Phase
from apr_jax.train.rl.objective import choose_objective
from apr_jax.train.rl.sample import Sampler
from apr_jax.train.run_folder import held
from apr_jax.train.sft import sft_options, train_sft
from apr_jax.train.signals import stop_signal
from apr_jax.train.skipping import SkippedSteps

_COMPARED_PROBLEMS = 64  # of the train split, by the hosts of a job


def train(
    config: Config, workdir: pathlib.Path, checkpoint: pathlib.Path | None = None, start: pathlib.Path | None = None
) -> dict[str, Any]:
    """Run the stages that are not done yet in `workdir`, and return the summary.

    Args:
      checkpoint: the policy to start GRPO from (`load_policy`); SFT is then left out.
      start: the policy to start SFT from; None: fresh weights. Not read where SFT has a checkpoint to go on from.
    Raises:
      ConfigError: `check_training` finds a fault, the mesh needs more devices than there are, or `workdir` or
        `checkpoint` belongs to another config.
      StoppedError: SIGTERM or SIGINT came; all that was finished is saved, and the same call goes on from there.
    """
    check_training(config)  # what cannot work is refused before any work
    mesh = make_mesh(config.mesh)
    hosts.meet(mesh)
    with stop_signal(mesh).listening() as stop:
        run = _Run(config, workdir, mesh, stop)
        given = run.read_given({"sft": start, "grpo": checkpoint})  # may refuse: the folder is made later
        with held(workdir), naming(workdir):
            return run.run(given)


def check_training(config: Config) -> None:
    """Raise ConfigError for a run that could not train its policy, as far as its configuration tells."""
    if METHODS[config.data.method].shares_cache and config.grpo.num_steps:
        raise ConfigError(
            f"data.method={config.data.method!r} is trained by SFT alone: GRPO takes each call as its own sequence, "
            f"and workers saw each other's; set grpo.num_steps=0 (it is {config.grpo.num_steps})"
        )
    if METHODS[config.data.method].shares_cache and config.data.facts_share:
        raise ConfigError(
            f"data.facts_share={config.data.facts_share}: data.method={config.data.method!r} has workers that see each "
            "other, and facts have none; set it to 0"
        )
    check_run(config)
    choose_objective(config.grpo)
    if config.sft.number_waves:
        check_width(config.model.embed_dim)


class Problems(Sequence[Any]):
    """The problems of the train split, drawn when they are asked for."""

    def __init__(self, config: Config) -> None:
        self._splits, self._size = draw_splits(config), split_size(config.data, "train")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._splits.problem("train", range(len(self))[index])


class _Run:
    """The stages of a run, and the tokenizer, engine and stop signal that they share."""

    def __init__(self, config: Config, workdir: pathlib.Path, mesh: Mesh, stop: StopSignal) -> None:
        self.config, self.workdir, self.mesh, self.stop = config, workdir, mesh, stop
        self.tokenizer: Tokenizer = config_tokenizer(config)
        check_vocabulary(config.model, self.tokenizer)
        check_spelling(config, self.tokenizer)
        # An engine that cannot fit is refused before any training.
        plan = plan_engine(config, mesh, hosts.from_first(self._sizes_so_far))
        self.fitted = dataclasses.replace(fit_to(config, mesh), engine=plan.sizes)
        self.engine = RunEngine(self.fitted, mesh, self.tokenizer, stop)
        self.origins = Origins(workdir, self.tokenizer)
        self.evaluations = Evaluations(config, workdir, self.tokenizer, self.engine, stop)
        print(f"engine memory: {plan.memory}", file=hosts.messages())
        print(
            f"engine: {plan.sizes.lanes} lanes and {plan.sizes.pages:,} pages on each of {plan.limits.num_shards} data "
            f"shards{' of each host' if jax.process_count() > 1 else ''}",
            file=hosts.messages(),
        )

    def _sizes_so_far(self) -> dict[str, Any]:
        """Return the lanes and pages that the run has had so far; nothing for a new run."""
        file = self.workdir / "engine.json"
        return read_json(file, "remove it, and they are chosen again") if file.exists() else {}

    def read_given(self, paths: Mapping[PhaseName, pathlib.Path | None]) -> dict[PhaseName, Given]:
        """Load the policy of each phase that one was named for. All hosts of a job must find the same."""
        with self._busy("Reading the policy to start from"):
            given = {phase: load_given(phase, path, self.config) for phase, path in paths.items() if path is not None}
            for phase, policy in given.items():
                hosts.check_same(f"the policy that {phase} starts from", policy.weights)
        return given

    def run(self, given: dict[PhaseName, Given]) -> dict[str, Any]:
        """Run the stages. What is in `given` is taken out, so that its memory is free afterwards."""
        config = self.config
        checkpoint = given["grpo"].path if "grpo" in given else None
        with Checkpoints(self.workdir, "sft", config) as sft, Checkpoints(self.workdir, "grpo", config) as grpo:
            with self._busy("Checking the checkpoints"):
                done, writer = self._settle(sft, grpo, given)
            started = has_reference(self.workdir)
            with writer:
                if not started and checkpoint:
                    save_reference(self.workdir, given["grpo"].placed(self.mesh, config))
                elif not started:
                    save_reference(self.workdir, self._sft(self._build_data(), given.get("sft"), sft, writer))
                given.clear()  # whole weights on one device
                with self._busy("Reading the reference policy"):
                    reference = load_reference(self.workdir, abstract_params_on(self.mesh, config.model))
                    check_finite(reference, self.workdir / "checkpoints" / "reference")
                    self.origins.note("grpo", checkpoint, weights_digest(reference), has_begun=bool(done["grpo"]))
                summary = self.evaluations.run("before", reference)
                policy = self._grpo(reference, self._phase(grpo, writer))
                summary |= self.evaluations.run("after", policy)
        if hosts.is_first():
            with self._busy("Writing the report"):
                write_json(self.workdir / "summary.json", summary)
                self.evaluations.save_rollouts()
                write_report(self.workdir)
                write_figure(self.workdir, self.workdir / "figure.svg")
        return summary

    def _busy(self, what: str) -> contextlib.AbstractContextManager[None]:
        return busy(what, hosts.messages())

    def _settle(
        self, sft: Checkpoints, grpo: Checkpoints, given: Mapping[PhaseName, Given]
    ) -> tuple[dict[PhaseName, int], MetricsWriter]:
        """Make the folder one that this run goes on in. Whatever refuses that does so before anything is written.

        Return the steps that each phase has done, and the writer that goes on after them.
        """
        of_phase: dict[PhaseName, Checkpoints] = {"sft": sft, "grpo": grpo}
        found = {phase: checkpoints.look() for phase, checkpoints in of_phase.items()}
        done = {phase: one.step or 0 for phase, one in found.items()}
        for phase, policy in given.items():
            if has_reference(self.workdir) or done["grpo"] or (phase == "sft" and done["sft"]):
                self.origins.check(policy)
        if self.config.lora.rank and not (given or any(done.values()) or has_reference(self.workdir)):
            raise ConfigError(
                f"lora.rank={self.config.lora.rank}: fresh weights have nothing that adapters could adapt; name a "
                "pretrained policy with --start or --checkpoint, or set lora.rank=0"
            )
        is_extended = sft.is_extended(found["sft"].step) and has_reference(self.workdir)
        if is_extended and done["grpo"]:
            raise ConfigError(
                f"sft.num_steps={self.config.sft.num_steps}: SFT ended at step {done['sft']} and GRPO started from its "
                f"policy. Set it back to go on with GRPO, or choose another --workdir."
            )
        damage = reference_damage(self.workdir)
        is_lost = bool(damage) or not has_reference(self.workdir)
        if done["grpo"] and is_lost and not done["sft"] and "grpo" not in given:
            raise CheckpointError(
                f"{self.workdir}/checkpoints/reference: the policy that GRPO started from is missing or damaged, and "
                "no checkpoint of SFT is left to make it from; name the policy with --checkpoint, or restore the folder"
            )
        if hosts.is_first():
            write_json(self.workdir / "config.json", to_dict(self.config))
            write_json(self.workdir / "engine.json", dataclasses.asdict(self.fitted.engine))
        for phase, checkpoints in of_phase.items():
            checkpoints.settle(found[phase])
        if is_extended:
            forget_reference(self.workdir)
        elif damage:
            set_reference_aside(self.workdir, damage)
        last: PhaseName = "grpo" if has_reference(self.workdir) or done["grpo"] else "sft"
        crc = of_phase[last].meta(done[last]).get(METRICS_CRC) if done[last] else None
        writer = MetricsWriter(self.workdir, last, done[last], done=done, crc=crc, writes=hosts.is_first())
        records = read_step_log(self.workdir / "metrics.jsonl").records
        for phase, checkpoints in of_phase.items():
            hosts.from_first(functools.partial(mend_scores, checkpoints.directory, phase, records))
        return done, writer

    def _phase(self, checkpoints: Checkpoints, writer: MetricsWriter) -> Phase:
        skipped = SkippedSteps(self.workdir, self.config.faults.max_skipped_steps)
        return Phase(checkpoints, writer, self.stop, skipped)

    def _build_data(self) -> DemonstrationSource:
        """Return the train split. Builds all splits where they are absent, under a progress bar for each."""
        with contextlib.ExitStack() as bar:  # one after the other; the last one stays while the files are written
            bars: dict[str, Progress] = {}
            bar.enter_context(self._busy("Building the data set"))

            def on_progress(split: str, done: int, total: int) -> None:
                if split not in bars:
                    bar.close()
                    shown = progress(total, f"Demonstrations ({split})", "problem", hosts.messages())
                    bars[split] = bar.enter_context(shown)
                bars[split].update(done - bars[split].done)

            def build() -> None:
                demonstrations.load_split(self.config, "train", on_progress)

            self.stop.together(build)
        with self._busy("Reading the data set"):
            split = demonstrations.load_split(self.config, "train")
            if jax.process_count() > 1:
                hosts.check_same("the data set", split.digest())
        return split

    def _sft(
        self,
        split: DemonstrationSource,
        given: Given | None,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
    ) -> Params:
        """Return the policy after SFT, which starts from a policy that was given or from fresh weights."""
        config, has_begun = self.config, checkpoints.latest_step() is not None
        path, weights = (None, None) if given is None else (given.path, given.weights)
        if given or not has_begun:
            self.origins.note("sft", path, weights, has_begun=has_begun)
        sft, start = self.fitted.sft, self._start(given, has_begun)
        options = sft_options(config)
        calls, reopen = self._tokenise(split, options)
        with self.stop.interrupting(), self._busy("Packing the first rows"):
            held_out = demonstrations.load_split(config, "validation")
            validation = validation_batch(held_out, self.tokenizer, options, sft.validation_rows)
            rows = train_iterator(
                calls,
                self.tokenizer,
                options,
                rows_per_batch=sft.rows_per_step,
                seed=config.seed,
                make_facts=self._facts if config.data.facts_share else None,
                num_workers=1 if self.mesh.devices.flat[0].platform == "cpu" else config.data.num_workers,
                reopen=reopen,
            )
        return train_sft(
            sft,
            config.model,
            self.mesh,
            self._phase(checkpoints, writer),
            rows=rows,
            validation_rows=validation,
            seed=config.seed,
            params=start,
            lora=config.lora,
        )

    def _tokenise(
        self, split: DemonstrationSource, options: SequenceOptions
    ) -> tuple[Calls, Callable[[], Calls] | None]:
        """Return the train split's token ids, made once for a data set and tokenizer, and how others open them."""
        found: list[tuple[Calls, Callable[[], Calls] | None]] = []  # not what `work` returns, which hosts would send

        def work() -> None:
            with self._busy("Reading the token ids"):
                store = TokenStore(self.config, "train", options, split.digest())
                calls = store.read()
            if calls is None:
                with progress(len(split), "Tokenising the demonstrations", "problem", hosts.messages()) as bar:
                    calls = store.make(bar.update)
            found.append((calls, store.reopener()))

        self.stop.together(work)
        return found[0]

    def _facts(self, num_tokens: int) -> Facts:
        """Make the bare facts that are mixed into `num_tokens` of demonstrations."""
        config = self.config
        return Facts.of_share(
            config.data.facts_share,
            num_tokens,
            task_of(config),
            config.task,
            self.tokenizer,
            seed=config.seed,
            row_len=config.sft.row_len,
        )

    def _start(self, given: Given | None, has_begun: bool) -> Params | None:
        """Return the weights that SFT starts from. The base of adapters is saved, for later starts need it too."""
        config = self.config
        if not config.lora.rank:
            return self._fresh() if given is None else given.placed(self.mesh, config)
        if given is not None and not has_begun:
            forget_reference(self.workdir, "base")
            save_reference(self.workdir, given.placed(self.mesh, config), "base")
        with self._busy("Reading the base of the adapters"):
            base: Params = load_reference(self.workdir, abstract_params_on(self.mesh, config.model), "base")
            check_finite(base, self.workdir / "checkpoints" / "base")
        return base

    def _fresh(self) -> Params | None:
        """Make the weights that SFT starts from without a policy, or return None if it draws them itself."""
        config = self.config
        if not config.sft.number_waves:
            return None
        params = with_number_waves(init_params(config.model, config.seed), self.tokenizer, config.sft.number_waves)
        return place_params(params, self.mesh, config.model)

    def _grpo(self, reference: Params, phase: Phase) -> Params:
        config, grpo = self.fitted, self.fitted.grpo
        if grpo.num_steps == 0:
            return reference
        engine = self.engine.holding(reference)
        held_out: list[Any] = []
        if grpo.validate_every:
            held_out = load_problems(config, "validation", grpo.validation_problems)
        problems = Problems(config)
        if jax.process_count() > 1:  # those of a file may differ
            first = [task_of(config).describe(problem) for problem in problems[:_COMPARED_PROBLEMS]]
            hosts.check_same("the problems", hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16])
        sampler = Sampler(config, engine, problems, held_out, self.tokenizer)
        return train_grpo(config, self.mesh, phase, sampler, reference)
