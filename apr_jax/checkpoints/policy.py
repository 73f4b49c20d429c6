"""Reading a policy from any folder that holds one."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from apr_jax.checkpoints.best import best_step
from apr_jax.checkpoints.integrity import CheckpointError, check_files, read_meta
from apr_jax.checkpoints.phases import PHASES
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.config import MeshConfig, ModelConfig
from apr_jax.model.params import Params
from apr_jax.model.placement import abstract_params_on
from apr_jax.model.weights.hf import load_hf
from apr_jax.parallel.mesh import make_mesh

POLICY = "policy"  # the item of a checkpoint that holds the model's parameters


def load_policy(path: pathlib.Path) -> tuple[ModelConfig, Params, dict[str, Any] | None]:
    """Load a policy onto one device, for evaluation or as the start of training.

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
        meta = read_meta(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged: {error}. Name another checkpoint of the run.") from error
    model = ModelConfig(**meta["config"]["model"])
    abstract = abstract_params_on(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()), model)
    target = ocp.args.Composite(**{POLICY: ocp.args.StandardRestore(flatten(abstract))})
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    return model, unflatten(abstract, checkpointer.restore(folder, args=target)[POLICY]), meta["config"]


def _checkpoint_folder(path: pathlib.Path) -> pathlib.Path | None:
    """Find the newest checkpoint in a run, phase or checkpoint folder; for PATH/best the best one in PATH.

    Raises FileNotFoundError where the best is asked for and no checkpoint was validated.
    """
    if (path / "meta").is_dir() and (path / POLICY).is_dir():
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
    """Return the steps with a checkpoint in a phase's folder."""
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    return [int(name) for name in names if name.isdigit() and (folder / name / "meta").is_dir()]
