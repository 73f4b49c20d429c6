"""Orbax checkpoints: policy, optimiser, position in the data, and which configuration they belong to.

    WORKDIR/checkpoints/sft/STEP    one folder a checkpoint, written whole or not at all
    WORKDIR/checkpoints/grpo/STEP
    WORKDIR/checkpoints/reference   GRPO's first policy, which its KL term refers to; written once

All randomness of a run is derived from (seed, phase, step), so that the seed and the step are its whole RNG state.
"""

import pathlib
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from apr_jax.config import Config, ConfigError, MeshConfig, ModelConfig, to_dict
from apr_jax.model.hf import load_hf
from apr_jax.model.llama import Params
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.state import TrainState, abstract_params_on

Phase = Literal["sft", "grpo"]
PHASES: tuple[Phase, ...] = ("sft", "grpo")

# What a checkpoint's numbers depend on. The rest (mesh, evaluation, name, ...) may change from one start to the next.
_SECTIONS = {
    "sft": ("seed", "model", "task", "data", "sft"),
    "grpo": ("seed", "model", "task", "data", "rollout", "grpo"),
}
_FREE = ("data.directory", "data.num_workers", "sft.checkpoint_every", "grpo.checkpoint_every")


class Checkpoints:
    """The checkpoints of one phase of a run. Call `close` (or leave the with-block) before the process ends."""

    def __init__(self, workdir: pathlib.Path, phase: Phase, config: Config, keep: int = 2) -> None:
        self.phase, self._config = phase, config
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints" / phase).absolute(), options=options)

    def latest_step(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Saves in the background; the state's arrays are copied before it returns and may then be donated.

        Args:
          data_state: JSON-able position of the data iterator.
        """
        meta = {"phase": self.phase, "step": step, "seed": self._config.seed, "config": to_dict(self._config)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardSave(_flatten(state.params)),
                optimizer=ocp.args.StandardSave(_flatten((state.step, state.opt_state))),
                data=ocp.args.JsonSave(data_state),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def save_if_new(self, step: int, state: TrainState, data_state: Any) -> None:
        """Saves unless this step is saved already, or is step 0, which needs no checkpoint."""
        if step and step != self.latest_step():
            self.save(step, state, data_state)

    def check(self) -> None:
        """Raises ConfigError when the last checkpoint was made under another configuration; names each field."""
        step = self.latest_step()
        if step is not None:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            check_same(meta["config"], to_dict(self._config), self.phase, str(self._manager.directory / str(step)))

    def restore(self, abstract: TrainState) -> tuple[TrainState, Any]:
        """The last complete checkpoint and its data position.

        Args:
          abstract: a ShapeDtypeStruct with a sharding for each array.
        Raises:
          FileNotFoundError: there is none.
          ConfigError: it was made under another configuration; names each field with both values.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no complete checkpoint under {self._manager.directory}")
        self.check()
        rest = (abstract.step, abstract.opt_state)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardRestore(_flatten(abstract.params)),
                optimizer=ocp.args.StandardRestore(_flatten(rest)),
                data=ocp.args.JsonRestore(),
            ),
        )
        count, opt_state = _unflatten(rest, items["optimizer"])
        return TrainState(count, _unflatten(abstract.params, items["policy"]), opt_state), items["data"]

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    """The reference policy, with the shardings of `abstract`. Raises FileNotFoundError where none was saved."""
    path = (workdir / "checkpoints" / "reference").absolute()
    if not path.exists():
        raise FileNotFoundError(f"no reference policy at {path}")
    with ocp.StandardCheckpointer() as checkpointer:
        return _unflatten(abstract, checkpointer.restore(path, _flatten(abstract)))


def load_policy(path: pathlib.Path) -> tuple[ModelConfig, Params, dict[str, Any] | None]:
    """Loads a policy for evaluation or as GRPO's start.

    Args:
      path: a run folder (its newest checkpoint, GRPO's before SFT's), a checkpoint folder, or a Hugging Face folder.
    Returns: the model's config, its parameters, and the whole config it was trained with (None from Hugging Face).
    Raises: FileNotFoundError when there is no policy at `path`.
    """
    path = path.absolute()
    folder = _checkpoint_folder(path)
    if folder is None:
        if list(path.glob("*.safetensors")):
            model, params = load_hf(path)
            return model, params, None
        raise FileNotFoundError(f"{path} is neither a run folder, a checkpoint folder nor a Hugging Face folder")
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    meta = checkpointer.restore(folder, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    model = ModelConfig(**meta["config"]["model"])
    abstract = abstract_params_on(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()), model)
    target = ocp.args.Composite(policy=ocp.args.StandardRestore(_flatten(abstract)))
    return model, _unflatten(abstract, checkpointer.restore(folder, args=target)["policy"]), meta["config"]


def check_same(saved: dict[str, Any], current: dict[str, Any], phase: Phase, where: str) -> None:
    """Raises ConfigError when a field that the phase's numbers depend on differs."""
    then, now = fields_that_matter(saved, phase), fields_that_matter(current, phase)
    different = [
        f"  {field}: {then.get(field, 'absent')!r} saved, {now.get(field, 'absent')!r} now"
        for field in sorted({*now, *then})
        if then.get(field) != now.get(field)
    ]
    if different:
        raise ConfigError(
            f"{where} was made with another configuration:\n" + "\n".join(different) + "\n"
            "Restore these fields to go on with it, or choose another --workdir to start anew."
        )


def fields_that_matter(config: dict[str, Any], phase: Phase, *more_sections: str) -> dict[str, Any]:
    """The fields that a phase's numbers depend on, and those of `more_sections`, by dotted name."""
    sections = {*_SECTIONS[phase], *more_sections}
    fields = _leaves(config).items()
    return {name: value for name, value in fields if name.split(".")[0] in sections and name not in _FREE}


def _checkpoint_folder(path: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint in a run, phase or checkpoint folder."""
    if (path / "meta").is_dir() and (path / "policy").is_dir():
        return path
    roots = [path / "checkpoints" / phase for phase in reversed(PHASES)] + [path / phase for phase in reversed(PHASES)]
    for root in [*roots, path]:
        steps = [int(child.name) for child in root.iterdir() if child.name.isdigit()] if root.is_dir() else []
        complete = [step for step in steps if (root / str(step) / "meta").is_dir()]
        if complete:
            return root / str(max(complete))
    return None


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _flatten(tree: Any) -> dict[str, Any]:
    """Arrays by their dotted path: what is on disk does not depend on Python classes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unflatten(like: Any, flat: dict[str, Any]) -> Any:
    paths = jax.tree_util.tree_leaves_with_path(like)
    keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return jax.tree.unflatten(jax.tree.structure(like), [flat[key] for key in keys])
