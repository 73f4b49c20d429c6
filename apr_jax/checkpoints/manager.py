"""Orbax checkpoints: policy, optimiser, position in the data, and which configuration they belong to.

    WORKDIR/checkpoints/sft/STEP        one folder a checkpoint, written whole or not at all, with checksums
    WORKDIR/checkpoints/sft/best.json   the validation score of each (best.py); `WORKDIR/best` names the best policy
    WORKDIR/checkpoints/grpo/           likewise
    WORKDIR/checkpoints/reference       GRPO's first policy, which its KL term refers to; written once
    WORKDIR/checkpoints/unusable        checkpoints that were damaged or another run's, moved out of the way

All randomness of a run is derived from (seed, phase, step), so that the seed and the step are its whole RNG state. The
position in the data counts global batches: it depends neither on the mesh nor on the number of processes.
"""

import json
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from apr_jax.checkpoints.best import PreserveBest, add_score, best_step, read_scores
from apr_jax.checkpoints.integrity import CheckpointError, check_files, write_sums
from apr_jax.checkpoints.phases import PHASES, Phase
from apr_jax.checkpoints.resume_check import check_same
from apr_jax.checkpoints.state import TrainState, abstract_params_on
from apr_jax.config import Config, ConfigError, MeshConfig, ModelConfig, to_dict
from apr_jax.model.hf import load_hf
from apr_jax.model.llama import Params
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import make_mesh


class Restored(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    position: Any  # of the data iterator
    skipped_in_a_row: int  # steps up to this one whose update was left out (skipping.py)


class Checkpoints:
    """The checkpoints of one phase of a run. Call `close` (or leave the with-block) before the process ends."""

    def __init__(self, workdir: pathlib.Path, phase: Phase, config: Config) -> None:
        self.phase, self._config = phase, config
        self.directory = (workdir / "checkpoints" / phase).absolute()
        newest = checkpoint_managers.LatestN(config.faults.keep_checkpoints)
        policies = [newest, PreserveBest(self.directory, phase)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_sums),
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """The step of the last complete checkpoint; after `settle`, of the last that can be used."""
        return self._manager.latest_step()

    def settle(self) -> int | None:
        """Makes the last checkpoint one that can be used: damaged and foreign ones after it are moved out of the way.

        Checks the files of those it looks at against their checksums. Returns the step; None where there is none.
        Raises:
          ConfigError: none is of this configuration; names each field with both values.
          CheckpointError: there are checkpoints, and all are damaged.
        """
        usable, unusable = hosts.from_first(self._look)
        if unusable and usable is None:
            foreign = [problem for problem in unusable.values() if isinstance(problem, ConfigError)]
            raise (
                foreign[0]
                if foreign
                else CheckpointError(
                    f"no checkpoint under {self.directory} can be used:\n"
                    + "\n".join(f"  {step}: {problem}" for step, problem in unusable.items())
                    + "\nMove the folder away to start this phase anew."
                )
            )
        hosts.from_first(lambda: self._set_aside(unusable))  # all are moved before another host reads what there is
        self._manager.reload()
        return usable

    def is_extended(self) -> bool:
        """Whether the phase was done when it was last saved, and has more steps to do now."""
        step = self.latest_step()
        if step is None:
            return False
        then = _read_meta(self.directory / str(step))["config"][self.phase]["num_steps"]
        now: int = to_dict(self._config)[self.phase]["num_steps"]
        return bool(step >= then and now > then)

    def save(self, step: int, state: TrainState, data_state: Any, skipped_in_a_row: int = 0) -> None:
        """Saves in the background; the state's arrays are copied before it returns and may then be donated.

        Args:
          data_state: JSON-able position of the data iterator, in global batches.
        """
        meta = {
            "phase": self.phase,
            "step": step,
            "seed": self._config.seed,
            "config": to_dict(self._config),
            "skipped_in_a_row": skipped_in_a_row,
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardSave(_flatten(state.params)),
                optimizer=ocp.args.StandardSave(_flatten((state.step, state.opt_state))),
                data=ocp.args.JsonSave(data_state),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def save_if_new(self, step: int, state: TrainState, data_state: Any, skipped_in_a_row: int = 0) -> None:
        """Saves unless this step is saved already, or is step 0, which needs no checkpoint."""
        if step and step != self.latest_step():
            self.save(step, state, data_state, skipped_in_a_row)

    def score(self, step: int, value: float) -> None:
        """Notes a step's validation score. The best of the checkpoints is kept, however many follow."""
        if hosts.is_first():
            add_score(self.directory, self.phase, step, value)

    def has_score(self, step: int) -> bool:
        """Whether the step was validated before."""
        return step in read_scores(self.directory, self.phase)

    def restore(self, abstract: TrainState) -> Restored:
        """The last complete checkpoint.

        Args:
          abstract: a ShapeDtypeStruct with a sharding for each array.
        Raises:
          FileNotFoundError: there is none.
          ConfigError: it was made under another configuration; names each field with both values.
          CheckpointError: its files are damaged, in a way that `settle` could not see.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no complete checkpoint under {self.directory}")
        rest = (abstract.step, abstract.opt_state)
        target = ocp.args.Composite(
            policy=ocp.args.StandardRestore(_flatten(abstract.params)),
            optimizer=ocp.args.StandardRestore(_flatten(rest)),
            data=ocp.args.JsonRestore(),
        )
        meta = _read_meta(self.directory / str(step))
        check_same(meta, to_dict(self._config), self.phase, str(self.directory / str(step)))
        try:
            items = self._manager.restore(step, args=target)
        except Exception as error:  # Orbax raises ValueError, KeyError and bare Exception for what it cannot read
            raise CheckpointError(f"{self.directory / str(step)} cannot be read; move it away: {error}") from error
        count, opt_state = _unflatten(rest, items["optimizer"])
        state = TrainState(count, _unflatten(abstract.params, items["policy"]), opt_state)
        return Restored(state, items["data"], meta.get("skipped_in_a_row", 0))

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> tuple[int | None, dict[int, Exception]]:
        """The last step that can be used, and why each after it cannot."""
        unusable: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.directory / str(step)
            try:
                check_files(folder)
                check_same(_read_meta(folder), to_dict(self._config), self.phase, str(folder))
            except (ConfigError, CheckpointError) as error:
                unusable[step] = error
            else:
                return step, unusable
        return None, unusable

    def _set_aside(self, problems: Mapping[int, Exception]) -> None:
        """Moves checkpoints that cannot be used out of the way, and says why each."""
        for step, problem in problems.items():
            source = self.directory / str(step)
            target = self.directory.parent / "unusable" / f"{self.phase}-{step}"
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
            print(f"{source} cannot be used and is now {target}: {problem}", file=sys.stderr)

    def _write_sums(self) -> None:
        """For the checkpoint whose files are all written, just before the rename that completes it."""
        if hosts.is_first():
            for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
                write_sums(folder)


def _read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """What `save` wrote about a checkpoint. Raises CheckpointError where it cannot be read."""
    try:
        return json.loads((folder / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"meta/metadata cannot be read: {error}") from error


def save_reference(workdir: pathlib.Path, params: Params) -> None:
    """Saves GRPO's reference policy, once: does nothing where it is saved already."""
    path = (workdir / "checkpoints" / "reference").absolute()
    if not path.exists():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, _flatten(params))


def has_reference(workdir: pathlib.Path) -> bool:
    """Whether GRPO's first policy is saved: SFT is done, or a policy was given."""
    return (workdir / "checkpoints" / "reference").exists()


def load_reference(workdir: pathlib.Path, abstract: Params) -> Params:
    """The reference policy, with the shardings of `abstract`.

    Raises FileNotFoundError where none was saved, CheckpointError where it cannot be read.
    """
    path = (workdir / "checkpoints" / "reference").absolute()
    if not path.exists():
        raise FileNotFoundError(f"no reference policy at {path}")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return _unflatten(abstract, checkpointer.restore(path, _flatten(abstract)))
    except Exception as error:  # as in `Checkpoints.restore`
        raise CheckpointError(
            f"the reference policy {path} cannot be read. Move it away, and it is made again from SFT's last "
            f"checkpoint or --checkpoint. ({error})"
        ) from error


def forget_reference(workdir: pathlib.Path) -> None:
    """Removes the reference policy, so that it is made anew. At no moment is there half of one."""
    path = (workdir / "checkpoints" / "reference").absolute()

    def remove() -> None:
        if path.exists():
            doomed = path.with_name("reference.removed")
            path.rename(doomed)
            shutil.rmtree(doomed)

    hosts.from_first(remove)  # it is gone before another host looks


def load_policy(path: pathlib.Path) -> tuple[ModelConfig, Params, dict[str, Any] | None]:
    """Loads a policy for evaluation or as GRPO's start.

    Args:
      path: a run folder (its newest checkpoint, GRPO's before SFT's), a checkpoint folder, or a Hugging Face folder;
        or "best" in one of the first two: the checkpoint with the best validation score.
    Returns: the model's config, its parameters, and the whole config it was trained with (None from Hugging Face).
    Raises: FileNotFoundError when there is no policy at `path`, CheckpointError when it is damaged.
    """
    path = path.absolute()
    folder = _checkpoint_folder(path)
    if folder is None:
        if list(path.glob("*.safetensors")):
            model, params = load_hf(path)
            return model, params, None
        raise FileNotFoundError(f"{path} is neither a run folder, a checkpoint folder nor a Hugging Face folder")
    try:
        check_files(folder)
        meta = _read_meta(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged: {error}. Name another checkpoint of the run.") from error
    model = ModelConfig(**meta["config"]["model"])
    abstract = abstract_params_on(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()), model)
    target = ocp.args.Composite(policy=ocp.args.StandardRestore(_flatten(abstract)))
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    return model, _unflatten(abstract, checkpointer.restore(folder, args=target)["policy"]), meta["config"]


def _checkpoint_folder(path: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint in a run, phase or checkpoint folder; of PATH/best the best of PATH.

    Raises FileNotFoundError where the best is asked for and no checkpoint was validated.
    """
    if (path / "meta").is_dir() and (path / "policy").is_dir():
        return path
    best = path.name == "best" and not path.exists()
    root = path.parent if best else path
    for folder in (root / "checkpoints", root, root.parent):
        for phase in reversed(PHASES):
            inside = folder / phase
            if folder == root.parent and inside != root:  # a phase's own folder
                continue
            steps = _steps_in(inside)
            chosen = best_step(inside, phase, steps) if best else max(steps, default=None)
            if chosen is not None:
                return inside / str(chosen)
    if best:
        raise FileNotFoundError(f"no checkpoint in {root} has a validation score, so none is the best")
    return None


def _steps_in(folder: pathlib.Path) -> list[int]:
    """The steps with a checkpoint in a phase's folder."""
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    return [int(name) for name in names if name.isdigit() and (folder / name / "meta").is_dir()]


def _flatten(tree: Any) -> dict[str, Any]:
    """Arrays by their dotted path: what is on disk does not depend on Python classes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unflatten(like: Any, flat: dict[str, Any]) -> Any:
    paths = jax.tree_util.tree_leaves_with_path(like)
    keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return jax.tree.unflatten(jax.tree.structure(like), [flat[key] for key in keys])
