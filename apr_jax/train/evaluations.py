"""The evaluations of a run, before and after GRPO. Each is done once and kept in WORKDIR/evaluations/."""

import dataclasses
import pathlib
import sys
from typing import Any, Literal

from apr_jax.checkpoints.phases import PHASES
from apr_jax.checkpoints.resume_check import fields_that_matter
from apr_jax.config import Config
from apr_jax.config_dict import to_dict
from apr_jax.data.tokenizer import Tokenizer, tokenizer_digest
from apr_jax.evaluation.run import ShownProgress, evaluate, load_problems, save_rollouts
from apr_jax.files import FileError, read_json, write_json
from apr_jax.model.params import Params, weights_digest
from apr_jax.parallel import hosts
from apr_jax.reasoning.settings import make_settings
from apr_jax.stopping import StopSignal
from apr_jax.train.hosted_engine import RunEngine

Stage = Literal["before", "after"]
STAGES: tuple[Stage, ...] = ("before", "after")


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run in `workdir`."""

    config: Config
    workdir: pathlib.Path
    tokenizer: Tokenizer
    engine: RunEngine
    stop: StopSignal

    def run(self, stage: Stage, params: Params) -> dict[str, Any]:
        """Return the stage's summaries by label, greedy and sampled, from disk where they were made before."""
        evaluation = self.config.evaluation
        if stage == "after" and self.config.grpo.num_steps == 0:
            before = self.run("before", params)  # the same policy
            return {label.replace("before", "after"): summary for label, summary in before.items()}
        temperatures = {stage: evaluation.temperature, f"{stage}_sampled": evaluation.also_temperature}
        return {label: self._at(stage, label, params, value) for label, value in temperatures.items()}

    def save_rollouts(self) -> None:
        """Write WORKDIR/rollouts.jsonl, which the report draws: the first problems' rollouts, before and after."""
        files = {str(stage): self._path(stage) for stage in STAGES}
        records = {stage: done["records"] for stage, path in files.items() if (done := _read(path)) is not None}
        save_rollouts(self.workdir / "rollouts.jsonl", records)

    def _at(self, stage: Stage, label: str, params: Params, temperature: float) -> dict[str, Any]:
        config, path = self.config, self._path(label)
        settings = fields_that_matter(to_dict(config), PHASES[0] if stage == "before" else PHASES[1], "evaluation")
        settings |= {"weights": weights_digest(params), "tokenizer": tokenizer_digest(self.tokenizer)}
        done = hosts.from_first(lambda: _read(path))
        if done is not None and done["settings"] == settings:
            return done["summary"]
        problems = load_problems(config, config.evaluation.split, config.evaluation.num_problems)
        title = f"Evaluate {stage} GRPO, temperature {temperature:g}"
        engine = self.engine.holding(params)
        with ShownProgress(len(problems), title, hosts.messages()) as shown, self.stop.interrupting():
            summary, records = evaluate(
                engine,
                problems,
                method=config.data.method,
                settings=make_settings(config, self.tokenizer),
                seed=config.seed,
                temperature=temperature,
                on_progress=shown,
            )
        drawn = [record for record in records if "calls" in record]
        if hosts.is_first():
            write_json(path, {"settings": settings, "summary": summary, "records": drawn}, sealed=True)
        return summary

    def _path(self, label: str) -> pathlib.Path:
        return self.workdir / "evaluations" / f"{label}.json"


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """Return a finished evaluation, None if there is none or its file is damaged: then it is done once more."""
    try:
        return read_json(path, "it is done again", sealed=True, settings=dict, summary=dict, records=list)
    except FileNotFoundError:
        return None
    except FileError as error:
        print(error, file=sys.stderr)
        return None
