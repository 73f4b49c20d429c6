"""One run from nothing to a report: data, SFT, evaluation, GRPO, evaluation. Every stage is resumable and done once.

WORKDIR/config.json         the configuration
WORKDIR/metrics.jsonl       one object a step (metrics.py)
WORKDIR/checkpoints/        checkpoints/manager.py
WORKDIR/evaluations/        one file for each evaluation that is done
WORKDIR/grpo_rollouts/      some rollouts that GRPO learnt from, with their advantages (kept_rollouts.py)
WORKDIR/skipped/            batches whose loss or gradient was not finite, of a run that gave up (skipping.py)
WORKDIR/summary.json, rollouts.jsonl, report.html, figure.svg
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.checkpoints.phases import PHASES
from apr_jax.checkpoints.policy import load_policy
from apr_jax.checkpoints.reference import forget_reference, has_reference, load_reference, save_reference
from apr_jax.checkpoints.resume_check import fields_that_matter
from apr_jax.config import Config, ConfigError, to_dict
from apr_jax.data import demonstrations
from apr_jax.data.pipeline import train_iterator, validation_batches
from apr_jax.data.tokenizer import Tokenizer, load_tokenizer
from apr_jax.evaluation.policy import check_vocabulary
from apr_jax.evaluation.report.run_report import write_figure, write_report
from apr_jax.evaluation.run import ShownProgress, evaluate, load_problems, save_rollouts
from apr_jax.files import write_json
from apr_jax.model.llama import Params
from apr_jax.model.placement import abstract_params_on, place_params
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import make_mesh
from apr_jax.progress import Progress, progress
from apr_jax.reasoning.outcome import make_settings
from apr_jax.tasks.base import Demonstration
from apr_jax.tasks.countdown.demonstrations import SHARED_METHODS
from apr_jax.train.grpo import train_grpo
from apr_jax.train.metrics import MetricsWriter
from apr_jax.train.phase import Phase
from apr_jax.train.rl.dynamic_sampling import Sample
from apr_jax.train.rl.hosted_engine import RolloutEngine, make_engine, plan_engine
from apr_jax.train.rl.kept_rollouts import keep_rollouts
from apr_jax.train.sft import train_sft
from apr_jax.train.signals import StopSignal, stop_signal
from apr_jax.train.skipping import SkippedSteps

Stage = Literal["before", "after"]


def train(
    config: Config,
    workdir: pathlib.Path,
    checkpoint: pathlib.Path | None = None,
    start: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Runs what of `config` is not done yet in `workdir`, and returns the summary.

    Args:
      checkpoint: the policy to start GRPO from (`load_policy`); SFT is then left out.
      start: the policy to start SFT from; None: fresh weights. Not read where SFT has a checkpoint to go on from.
    Raises:
      ConfigError: the mesh needs more devices than there are, or `workdir` or `checkpoint` belongs to another config.
      StoppedError: SIGTERM or SIGINT came; all that was finished is saved, and the same call goes on from there.
    """
    if config.data.method in SHARED_METHODS and config.grpo.num_steps:
        raise ConfigError(
            f"data.method={config.data.method!r} is trained by SFT alone: GRPO takes each call as its own sequence, "
            f"and workers saw each other's; set grpo.num_steps=0 (it is {config.grpo.num_steps})"
        )
    mesh = make_mesh(config.mesh)
    hosts.meet(mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with stop_signal(mesh).listening() as stop:
        return _Run(config, workdir, mesh, stop).run(checkpoint, start)


class Problems(Sequence[Any]):
    """The problems of a split, read when they are asked for."""

    def __init__(self, demonstrations: Sequence[Demonstration]) -> None:
        self._demonstrations = demonstrations

    def __len__(self) -> int:
        return len(self._demonstrations)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._demonstrations[index].problem


class _Run:
    def __init__(self, config: Config, workdir: pathlib.Path, mesh: Mesh, stop: StopSignal) -> None:
        self.config, self.workdir, self.mesh, self.stop = config, workdir, mesh, stop
        self.engine: RolloutEngine | None = None
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        check_vocabulary(config.model, self.tokenizer)
        plan = plan_engine(config, mesh)  # what cannot fit is refused before any training
        print(f"engine memory: {plan.memory}", file=hosts.messages())

    def run(self, checkpoint: pathlib.Path | None, start: pathlib.Path | None) -> dict[str, Any]:
        config = self.config
        if hosts.is_first():
            write_json(self.workdir / "config.json", to_dict(config))
        with Checkpoints(self.workdir, "sft", config) as sft, Checkpoints(self.workdir, "grpo", config) as grpo:
            sft_step, grpo_step = sft.settle() or 0, grpo.settle() or 0
            if sft.is_extended() and has_reference(self.workdir):
                self._reopen_sft(sft_step, grpo_step)
            started = has_reference(self.workdir)
            phase, step = (PHASES[1], grpo_step) if started else (PHASES[0], sft_step)
            self._build_data()
            with MetricsWriter(self.workdir, PHASES, phase, step, writes=hosts.is_first()) as writer:
                if not started:
                    trained = self._given(checkpoint) if checkpoint else self._sft(start, self._phase(sft, writer))
                    save_reference(self.workdir, trained)
                reference = load_reference(self.workdir, abstract_params_on(self.mesh, config.model))
                summary = self._evaluate("before", reference)
                policy = self._grpo(reference, self._phase(grpo, writer))
                summary |= self._evaluate("after", policy)
        if hosts.is_first():
            write_json(self.workdir / "summary.json", summary)
            self._save_rollouts()
            write_report(self.workdir)
            write_figure(self.workdir, self.workdir / "figure.svg")
        return summary

    def _phase(self, checkpoints: Checkpoints, writer: MetricsWriter) -> Phase:
        skipped = SkippedSteps(self.workdir, self.config.faults.max_skipped_steps)
        return Phase(checkpoints, writer, self.stop, skipped)

    def _reopen_sft(self, sft_step: int, grpo_step: int) -> None:
        """SFT was done, and `sft.num_steps` is more now: the reference policy that it led to is outdated."""
        if grpo_step:
            raise ConfigError(
                f"sft.num_steps={self.config.sft.num_steps}: SFT ended at step {sft_step} and GRPO started from its "
                f"policy. Set it back to go on with GRPO, or choose another --workdir."
            )
        forget_reference(self.workdir)

    def _build_data(self) -> None:
        """Builds the demonstrations where they are absent, under a progress bar for each split."""
        bars: dict[str, Progress] = {}

        def on_progress(split: str, done: int, total: int) -> None:
            if split not in bars:
                bars[split] = progress(total, f"Demonstrations ({split})", "problem", hosts.messages())
                bars[split].__enter__()
            bars[split].update(done - bars[split].done)
            if done == total:
                bars[split].__exit__(None)

        def build() -> None:
            demonstrations.load_split(self.config, "train", on_progress)

        self.stop.together(build)
        self.train_split = demonstrations.load_split(self.config, "train")

    def _given(self, checkpoint: pathlib.Path) -> Params:
        """The policy at `checkpoint`, on the mesh. Raises ConfigError where its weights are another model's."""
        model, params, _ = load_policy(checkpoint)
        there, here = dataclasses.asdict(model), dataclasses.asdict(self.config.model)
        wrong = [
            f"  model.{name}: {there[name]!r} there, {here[name]!r} here"
            for name in _WEIGHT_FIELDS
            if there[name] != here[name]
        ]
        if wrong:
            raise ConfigError(f"the policy of {checkpoint} is another model:\n" + "\n".join(wrong))
        return place_params(params, self.mesh, self.config.model)

    def _sft(self, start: pathlib.Path | None, phase: Phase) -> Params:
        """What SFT leads to, from the policy at `start` or from fresh weights."""
        config = self.config
        sft = config.sft
        how: dict[str, Any] = {
            "row_len": sft.row_len,
            "replay_weight": config.data.replay_weight,
            "loss_on_context": config.data.loss_on_context,
        }
        with self.stop.interrupting():  # a large split takes minutes
            validation = validation_batches(
                demonstrations.load_split(config, "validation"),
                self.tokenizer,
                rows_per_batch=sft.validation_rows,
                num_rows=sft.validation_rows,
                **how,
            )
            rows = train_iterator(
                self.train_split,
                self.tokenizer,
                rows_per_batch=sft.rows_per_step,
                seed=config.seed,
                shard_index=0,
                shard_count=1,
                **how,
            )
        return train_sft(
            sft,
            config.model,
            self.mesh,
            phase,
            rows=rows,
            validation_rows=validation[0],
            seed=config.seed,
            params=None if start is None else self._given(start),
        )

    def _grpo(self, reference: Params, phase: Phase) -> Params:
        if self.config.grpo.num_steps == 0:
            return reference
        engine = self._engine_with(reference)
        return train_grpo(
            self.config,
            self.mesh,
            params=reference,
            reference=reference if self.config.grpo.kl_coef > 0 else None,
            problems=Problems(self.train_split),
            tokenizer=self.tokenizer,
            engine=engine,
            phase=phase,
            validate=lambda: self._validation_accuracy(engine),
            keep=self._keep_rollouts,
        )

    def _keep_rollouts(self, step: int, sample: Sample) -> None:
        if hosts.is_first():
            keep_rollouts(self.workdir, step, sample, self.config, self.tokenizer)

    def _validation_accuracy(self, engine: RolloutEngine) -> float:
        """The share of validation problems that the engine's policy solves, greedily."""
        config = self.config
        problems = load_problems(config, "validation", config.grpo.validation_problems)
        settings = make_settings(config, self.tokenizer)
        how: dict[str, Any] = {
            "method": config.data.method,
            "settings": settings,
            "seed": config.seed,
        }
        summary, _ = evaluate(engine, self.tokenizer, problems, temperature=0.0, keep_calls=0, **how)
        return float(summary["accuracy"])

    def _engine_with(self, params: Params) -> RolloutEngine:
        """The run's one engine, which compiles its steps once for all stages."""
        if self.engine is None:
            self.engine = make_engine(self.config, self.mesh, self.tokenizer, params, self.stop)
            with self.stop.interrupting():
                self.engine.warm_up()  # so that no rate or latency counts compilation
        else:
            self.engine.set_params(params)
        return self.engine

    def _evaluate(self, stage: Stage, params: Params) -> dict[str, Any]:
        """The stage's summaries at both temperatures, from disk where they were made before."""
        evaluation = self.config.evaluation
        if stage == "after" and self.config.grpo.num_steps == 0:
            before = self._evaluate("before", params)  # the same policy
            return {label.replace("before", "after"): summary for label, summary in before.items()}
        temperatures = {stage: evaluation.temperature, f"{stage}_sampled": evaluation.also_temperature}
        return {label: self._evaluate_at(stage, label, params, value) for label, value in temperatures.items()}

    def _evaluate_at(self, stage: Stage, label: str, params: Params, temperature: float) -> dict[str, Any]:
        config, path = self.config, self.workdir / "evaluations" / f"{label}.json"
        settings = fields_that_matter(to_dict(config), PHASES[0] if stage == "before" else PHASES[1], "evaluation")
        done = hosts.from_first(lambda: json.loads(path.read_text()) if path.exists() else None)
        if done is not None and done["settings"] == settings:
            return done["summary"]
        problems = load_problems(config, config.evaluation.split, config.evaluation.num_problems)
        title = f"Evaluate {stage} GRPO, temperature {temperature:g}"
        engine = self._engine_with(params)
        with ShownProgress(len(problems), title, hosts.messages()) as shown, self.stop.interrupting():
            summary, records = evaluate(
                engine,
                self.tokenizer,
                problems,
                method=config.data.method,
                settings=make_settings(config, self.tokenizer),
                seed=config.seed,
                temperature=temperature,
                on_progress=shown,
            )
        drawn = [record for record in records if "calls" in record]
        if hosts.is_first():
            write_json(path, {"settings": settings, "summary": summary, "records": drawn})
        return summary

    def _save_rollouts(self) -> None:
        """The rollouts that the report draws: those of the first evaluation problems, before and after."""
        files = {stage: self.workdir / "evaluations" / f"{stage}.json" for stage in ("before", "after")}
        records = {stage: json.loads(path.read_text())["records"] for stage, path in files.items() if path.exists()}
        save_rollouts(self.workdir / "rollouts.jsonl", records)


# What must agree for weights to fit; the rest of ModelConfig may change from one run to the next.
_WEIGHT_FIELDS = (
    "vocab_size",
    "num_layers",
    "embed_dim",
    "mlp_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "tie_embeddings",
)
