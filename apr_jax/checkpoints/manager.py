"""The checkpoints of a run: pytrees and a position in the data, written whole or not at all.

    WORKDIR/checkpoints/sft/STEP        one folder a checkpoint, with the checksums of its files (integrity.py)
    WORKDIR/checkpoints/sft/best.json   the validation score of each (best.py); `WORKDIR/best` names the best policy
    WORKDIR/checkpoints/grpo/           likewise
    WORKDIR/checkpoints/reference       GRPO's first policy (reference.py)
    WORKDIR/checkpoints/unusable        checkpoints that were damaged or another run's, moved out of the way

A run derives all its randomness from (seed, phase, step), so these three are its whole RNG state.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from apr_jax.checkpoints.best import PreserveBest, add_score, read_scores
from apr_jax.checkpoints.identity import TOKENIZER, agreed_tokenizer, own_tokenizer
from apr_jax.checkpoints.integrity import CheckpointError, check_files, read_meta, set_aside, write_sums
from apr_jax.checkpoints.phases import PhaseName, steps_in
from apr_jax.checkpoints.resume_check import check_same
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import to_dict
from apr_jax.data.tokenizer import Spelling, config_tokenizer
from apr_jax.files import is_refusal, naming
from apr_jax.parallel import hosts
from apr_jax.paths import is_remote
from apr_jax.progress import busy


class Restored(NamedTuple):
    """The contents of a checkpoint."""

    trees: dict[str, Any]
    position: Any  # in the data: JSON-able, in global batches, so that it depends on neither mesh nor process count
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """The checkpoints of a phase, from the newest on until one can be used."""

    step: int | None  # the one that can be used
    foreign: dict[int, str]  # those of other configurations, and the difference
    damaged: dict[int, str]  # those with damaged files, and the damage


class Checkpoints:
    """The checkpoints of one phase of a run. Call `close` (or leave the with-block) before the process ends.

    Nothing is written, not even a folder, before `settle`, `latest_step` or `save` is called.
    """

    def __init__(self, workdir: pathlib.Path, phase: PhaseName, config: Config) -> None:
        self.phase, self._config = phase, config
        self._tokenizer = config_tokenizer(config)
        self.directory = (workdir / "checkpoints" / phase).absolute()
        self._saving = 0  # the step that is being saved, or was last

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        newest = checkpoint_managers.LatestN(self._config.faults.keep_checkpoints)
        policies = [newest, PreserveBest(self.directory, self.phase)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._complete),
            cleanup_tmp_directories=True,
            create=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Return the step of the last complete checkpoint; after `settle`, of the last that can be used."""
        return self._manager.latest_step()

    def look(self) -> Found:
        """Find the last checkpoint that can be used. Each that is looked at is compared with its checksums.

        Raises:
          ConfigError: none is of this configuration; names each field with both values.
          CheckpointError: there are checkpoints, and all are damaged.
        """
        found = hosts.from_first(self._look, [Found])
        if found.step is None and found.foreign:
            raise ConfigError(next(iter(found.foreign.values())))
        if found.step is None and found.damaged:
            raise CheckpointError(self._all_damaged(found.damaged))
        return found

    def settle(self, found: Found | None = None) -> int | None:
        """Move the damaged and foreign checkpoints that `look` found out of the way. Return the last step, if any."""
        found = found or self.look()
        unusable = {**found.foreign, **found.damaged}
        hosts.from_first(lambda: self._set_aside(unusable))  # all are moved before another host reads what there is
        self._manager.reload()
        return found.step

    def meta(self, step: int) -> dict[str, Any]:
        """Read what was noted about a checkpoint (`Restored.meta`)."""
        return read_meta(self.directory / str(step))

    def is_extended(self, step: int | None) -> bool:
        """Return True where the phase was done when `step`, its last one, was saved, and has more steps to do now."""
        if step is None:
            return False
        then = self.meta(step)["config"][self.phase]["num_steps"]
        now: int = to_dict(self._config)[self.phase]["num_steps"]
        return bool(step >= then and now > then)

    def save(self, step: int, trees: Mapping[str, Any], position: Any, **notes: Any) -> None:
        """Save in the background. The arrays are copied before it returns and may be donated then.

        Args:
          trees: pytrees of arrays, by the name under which `restore` asks for them.
          position: JSON-able position in the data (`Restored`).
          notes: JSON-able values to keep in `Restored.meta`.
        """
        meta = {"phase": self.phase, "step": step, "seed": self._config.seed, "config": to_dict(self._config), **notes}
        items = {name: ocp.args.StandardSave(flatten(tree)) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, data=ocp.args.JsonSave(position), meta=ocp.args.JsonSave(meta))
        with naming(self.directory):
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=args)

    def check(self) -> None:
        """Raise OSError if a checkpoint could not be written in the background. Wait for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def score(self, step: int, value: float) -> None:
        """Note a step's validation score. The best of the checkpoints is kept, however many follow."""
        if hosts.is_first():
            add_score(self.directory, self.phase, step, value)

    def has_score(self, step: int) -> bool:
        """Return True where the step was validated before."""
        return step in read_scores(self.directory, self.phase)

    def restore(self, abstract: Mapping[str, Any]) -> Restored:
        """Read the last complete checkpoint.

        Args:
          abstract: by name a pytree with a ShapeDtypeStruct and its sharding for each array.
        Raises:
          FileNotFoundError: there is none.
          ConfigError: it was made under another configuration; names each field with both values.
          CheckpointError: its files are damaged, in a way that `settle` could not see.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no complete checkpoint under {self.directory}")
        folder = self.directory / str(step)
        meta = self.meta(step)
        check_same(meta, to_dict(self._config), self.phase, str(folder))
        items = {name: ocp.args.StandardRestore(flatten(tree)) for name, tree in abstract.items()}
        try:
            with naming(folder):
                found = self._manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        except Exception as error:  # Orbax raises ValueError, KeyError and bare Exception for what it cannot read
            if is_refusal(error):
                raise
            raise CheckpointError(f"{folder} cannot be read; move it away: {error}") from error
        trees = {name: unflatten(tree, found[name]) for name, tree in abstract.items()}
        return Restored(trees, found["data"], meta)

    def wait(self) -> None:
        """Return when every save has reached the disk. Raise OSError where one does not."""
        with naming(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being saved. Raise OSError where that fails."""
        if "_manager" in vars(self):
            with naming(self.directory), busy("Writing the checkpoints", hosts.messages()):
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> Found:
        found = Found(None, {}, {})
        for step in sorted(steps_in(self.directory), reverse=True):
            folder = self.directory / str(step)
            try:
                check_files(folder)
                meta = read_meta(folder)
                check_same(meta, to_dict(self._config), self.phase, str(folder))
                agreed_tokenizer(
                    folder,
                    own_tokenizer(folder, meta["config"]),
                    self._config.data.tokenizer,
                    Spelling.of(self._config),
                )
            except ConfigError as error:
                found.foreign[step] = str(error)
            except CheckpointError as error:
                found.damaged[step] = str(error)
            else:
                return dataclasses.replace(found, step=step)
        return found

    def _all_damaged(self, unusable: Mapping[int, str]) -> str:
        return (
            f"no checkpoint under {self.directory} can be used:\n"
            + "\n".join(f"  {step}: {problem}" for step, problem in unusable.items())
            + f"\nMove {self.directory} away to start this phase anew."
        )

    def _set_aside(self, problems: Mapping[int, str]) -> None:
        for step, problem in problems.items():
            target = self.directory.parent / "unusable" / f"{self.phase}-{step}"
            set_aside(self.directory / str(step), target, problem)

    def _complete(self) -> None:
        """Add tokenizer and checksums to the checkpoint whose files are all written, just before it becomes one."""
        if hosts.is_first():
            at_work = [self.directory / str(self._saving)] if is_remote(self.directory) else None
            for folder in at_work or self.directory.glob("*.orbax-checkpoint-tmp*"):
                self._tokenizer.save(folder / TOKENIZER)
                write_sums(folder)
