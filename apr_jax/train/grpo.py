"""Group-relative policy optimisation on the engine's own rollouts (APR, arXiv 2504.15466, section 4.3).

One step, from top to bottom: sample rollouts with the policy as it is, reward them, compare each with its group, update
the policy on every call of every rollout that did better or worse, write what happened, save. Now and then the policy
is validated on held-out problems.

With `grpo.overlap` above 0 the rollouts of that many next steps are sampled along with a step's. They fill the lanes
that its last long rollouts leave empty, and are learnt from after the policy has moved on.
"""

import functools
import time
from collections import deque
from collections.abc import Callable

from jax.sharding import Mesh

from apr_jax.config import Config
from apr_jax.engine.threads import Progress as RolloutProgress
from apr_jax.model.lora import make_merge
from apr_jax.model.params import Params
from apr_jax.parallel import hosts
from apr_jax.progress import Progress, progress
from apr_jax.train.phase import Phase
from apr_jax.train.rl.kept_rollouts import kept_records
from apr_jax.train.rl.sample import Sample, Sampler
from apr_jax.train.rl.step_metrics import gap_metrics, packing, sample_metrics, timings, tokens_per_second
from apr_jax.train.rl.update import Updater
from apr_jax.train.scorer import fetch

_NO_POSITION: dict[str, int] = {}  # in the data: a step's problems follow from the seed and its number


def train_grpo(config: Config, mesh: Mesh, phase: Phase, sampler: Sampler, reference: Params) -> Params:
    """Train from `reference`, or from the last checkpoint, to `config.grpo.num_steps`. Returns the policy.

    Args:
      reference: the policy to start from, which the KL term refers to and adapters belong to.
    Raises:
      StoppedError: a signal came; the last finished step is saved.
      FloatingPointError: too many steps in a row were not finite (`phase.skipped`).
      Any error of a program or the engine: a bug is no reward.
    """
    grpo, engine, writer = config.grpo, sampler.engine, phase.writer
    updater = Updater(config, mesh, sampler.tokenizer)
    state, _ = phase.start(mesh, config.model, updater.optimizer, reference, config.seed, config.lora)
    base = reference if config.lora.rank else None
    merged = functools.partial(make_merge(mesh, config.model, config.lora), base)
    done = int(state.step) // grpo.inner_updates
    samples: deque[Sample] = deque()  # drawn and not yet learnt from; none at a checkpoint
    with progress(grpo.num_steps - done, "GRPO", "step", hosts.messages()) as bar:
        for step in range(done + 1, grpo.num_steps + 1):
            # Sample groups of rollouts from the policy that the step before left, with rewards and advantages. A signal
            # ends this at once, for a restart draws the same rollouts again.
            validation = {}
            if not samples:
                engine.set_params(merged(state.params))
                with phase.interruptible(step - 1, state, _NO_POSITION):
                    validation = _validate(sampler, phase, step - 1, bar)
                    began = time.perf_counter()
                    steps = range(step, step + 1 + grpo.overlap)
                    samples.extend(sampler.samples(steps, _shown_on(bar, "rollouts")))
                rate = tokens_per_second(samples, time.perf_counter() - began)
            sample = samples.popleft()
            rolled_out = time.perf_counter()

            # Update. Every call of every thread is a sequence, and the objective says what each of its tokens weighs.
            sequences = updater.sequences(sample.learnt)
            microbatches = updater.microbatches(sequences)
            state, terms, old = updater.update(state, microbatches, reference if grpo.kl_coef > 0 else None, base)

            # Write metrics, which a rerun reproduces to the byte, and times, which it does not.
            metrics = validation | sample_metrics(sample, config, sampler.tokenizer) | fetch(terms)
            metrics |= gap_metrics(microbatches, old, grpo.importance_cap)
            metrics["packing"] = packing(sequences, microbatches)
            seconds = time.perf_counter() - rolled_out
            writer.write("grpo", step, metrics)
            writer.write_timings("grpo", step, timings(sample, rate, seconds))
            shown = ("accuracy", "no_signal_groups", "children_per_rollout")
            bar.update(1, **{name: metrics[name] for name in shown})
            phase.skipped.note("grpo", step, metrics["skipped_rate"], functools.partial(updater.rows, sequences))

            # Save, now and then, at the end, and when all hosts agree that a signal came.
            regular = step % grpo.checkpoint_every == 0 or step == grpo.num_steps
            stopping = not samples and phase.stopping()
            if regular:
                writer.write_rollouts(step, kept_records(sample, config, sampler.tokenizer))
            if regular or stopping:
                phase.save(step, state, _NO_POSITION)
            if stopping:
                phase.stop.check()
        if not phase.checkpoints.has_score(grpo.num_steps):
            engine.set_params(merged(state.params))
            with phase.stop.interrupting():
                _validate(sampler, phase, grpo.num_steps, bar)
    return merged(state.params)


def _shown_on(bar: Progress, what: str) -> Callable[[RolloutProgress], None]:
    """Return an `on_progress` for the engine that shows on the bar of the steps how many rollouts are finished."""

    def show(now: RolloutProgress) -> None:
        bar.update(0, **{what: f"{now.finished:,}/{now.total:,}"}, tokens_per_second=now.tokens_per_second)

    return show


def _validate(sampler: Sampler, phase: Phase, step: int, bar: Progress) -> dict[str, float]:
    """Score the policy after `step` where that is due, and return the metric of it, or nothing."""
    every = sampler.config.grpo.validate_every
    if not every or step % every:
        return {}
    accuracy = sampler.accuracy(_shown_on(bar, "validated"))
    if step:  # step 0 is the reference, which is no checkpoint of this phase
        phase.checkpoints.score(step, accuracy)
    return {"validation_accuracy": accuracy}
