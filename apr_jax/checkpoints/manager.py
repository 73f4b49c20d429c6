"""The checkpoints of a run: pytrees and a position in the data, written whole or not at all.

    WORKDIR/checkpoints/sft/STEP        one folder a checkpoint, with the checksums of its files (integrity.py)
    WORKDIR/checkpoints/sft/best.json   the validation score of each (best.py); `WORKDIR/best` names the best policy
    WORKDIR/checkpoints/grpo/           likewise
    WORKDIR/checkpoints/reference       GRPO's first policy (reference.py)
    WORKDIR/checkpoints/unusable        checkpoints that were damaged or another run's, moved out of the way

A run derives all its randomness from (seed, phase, step), so these three are its whole RNG state.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from apr_jax.checkpoints.best import PreserveBest, add_score, read_scores
from apr_jax.checkpoints.identity import TOKENIZER, agreed_tokenizer, own_tokenizer
from apr_jax.checkpoints.integrity import CheckpointError, check_files, read_meta, write_sums
from apr_jax.checkpoints.phases import PhaseName
from apr_jax.checkpoints.resume_check import check_same
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import to_dict
from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.parallel import hosts


class Restored(NamedTuple):
    """The contents of a checkpoint."""

    trees: dict[str, Any]
    position: Any  # in the data: JSON-able, in global batches, so that it depends on neither mesh nor process count
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The reason why a checkpoint cannot be used."""

    is_foreign: bool  # whole, but another configuration's
    text: str


class Checkpoints:
    """The checkpoints of one phase of a run. Call `close` (or leave the with-block) before the process ends."""

    def __init__(self, workdir: pathlib.Path, phase: PhaseName, config: Config) -> None:
        self.phase, self._config = phase, config
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self.directory = (workdir / "checkpoints" / phase).absolute()
        newest = checkpoint_managers.LatestN(config.faults.keep_checkpoints)
        policies = [newest, PreserveBest(self.directory, phase)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._complete),
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Return the step of the last complete checkpoint; after `settle`, of the last that can be used."""
        return self._manager.latest_step()

    def settle(self) -> int | None:
        """Move damaged and foreign checkpoints out of the way, until the last one can be used.

        Each that is looked at is compared with its checksums. Returns the last step, None where there is none.
        Raises:
          ConfigError: none is of this configuration; names each field with both values.
          CheckpointError: there are checkpoints, and all are damaged.
        """
        usable, unusable = hosts.from_first(self._look, [_Problem])
        if unusable and usable is None:
            foreign = [problem.text for problem in unusable.values() if problem.is_foreign]
            raise ConfigError(foreign[0]) if foreign else CheckpointError(self._all_damaged(unusable))
        hosts.from_first(lambda: self._set_aside(unusable))  # all are moved before another host reads what there is
        self._manager.reload()
        return usable

    def is_extended(self) -> bool:
        """Return True where the phase was done when it was last saved, and has more steps to do now."""
        step = self.latest_step()
        if step is None:
            return False
        then = read_meta(self.directory / str(step))["config"][self.phase]["num_steps"]
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
        self._manager.save(
            step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(position), meta=ocp.args.JsonSave(meta))
        )

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
        meta = read_meta(folder)
        check_same(meta, to_dict(self._config), self.phase, str(folder))
        items = {name: ocp.args.StandardRestore(flatten(tree)) for name, tree in abstract.items()}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        except Exception as error:  # Orbax raises ValueError, KeyError and bare Exception for what it cannot read
            raise CheckpointError(f"{folder} cannot be read; move it away: {error}") from error
        trees = {name: unflatten(tree, found[name]) for name, tree in abstract.items()}
        return Restored(trees, found["data"], meta)

    def wait(self) -> None:
        """Return when every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being saved."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> tuple[int | None, dict[int, _Problem]]:
        """Return the last step that can be used, and why each after it cannot."""
        unusable: dict[int, _Problem] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.directory / str(step)
            try:
                check_files(folder)
                meta = read_meta(folder)
                check_same(meta, to_dict(self._config), self.phase, str(folder))
                agreed_tokenizer(folder, own_tokenizer(folder, meta["config"]), self._config.data.tokenizer)
            except (ConfigError, CheckpointError) as error:
                unusable[step] = _Problem(isinstance(error, ConfigError), str(error))
            else:
                return step, unusable
        return None, unusable

    def _all_damaged(self, unusable: Mapping[int, _Problem]) -> str:
        return (
            f"no checkpoint under {self.directory} can be used:\n"
            + "\n".join(f"  {step}: {problem.text}" for step, problem in unusable.items())
            + "\nMove the folder away to start this phase anew."
        )

    def _set_aside(self, problems: Mapping[int, _Problem]) -> None:
        """Move checkpoints that cannot be used out of the way, and say why each."""
        for step, problem in problems.items():
            source = self.directory / str(step)
            target = self.directory.parent / "unusable" / f"{self.phase}-{step}"
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
            print(f"{source} cannot be used and is now {target}: {problem.text}", file=sys.stderr)

    def _complete(self) -> None:
        """Add tokenizer and checksums to the checkpoint whose files are all written, just before its last rename."""
        if hosts.is_first():
            for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
                self._tokenizer.save(folder / TOKENIZER)
                write_sums(folder)
