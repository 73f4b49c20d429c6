"""Reading a policy from any folder or file that holds one."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from apr_jax.checkpoints.identity import POLICY, find_policy
from apr_jax.checkpoints.integrity import CheckpointError, check_files
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.config import ConfigError, MeshConfig, ModelConfig
from apr_jax.config_dict import read_model
from apr_jax.model.params import Params, abstract_params
from apr_jax.model.placement import abstract_params_on
from apr_jax.model.weights.gguf import load_gguf
from apr_jax.model.weights.hf import load_hf
from apr_jax.parallel.mesh import make_mesh


def load_policy(path: pathlib.Path) -> tuple[ModelConfig, Params, dict[str, Any] | None]:
    """Load a policy onto one device, for evaluation or as the start of training.

    Args:
      path: a run folder (its newest checkpoint, GRPO's before SFT's), a checkpoint folder, a Hugging Face folder, a
        GGUF file or a folder that holds one; or "best" in one of the first two: the checkpoint with the best
        validation score.
    Returns: the model's config, its parameters, and the whole config it was trained with (None where others made the
      folder or file).
    Raises: FileNotFoundError when there is no policy at `path`; CheckpointError or HuggingFaceError when it is damaged
      or holds NaN.
    """
    found = find_policy(path)
    if not found.is_checkpoint:
        trained = {} if found.config is None else found.config["model"]
        settings = {name: trained[name] for name in ("compute_dtype", "attention", "remat") if name in trained}
        return *(load_gguf if found.is_gguf else load_hf)(found.path, **settings), found.config
    try:
        check_files(found.path)
        config = found.config
        model = read_model(config["model"])  # type: ignore[index]  # a checkpoint has one
        params = _restore(found.path, model)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{found.path} is damaged: {error}. Name another checkpoint of the run.") from error
    return model, params, config


def check_finite(params: Params, where: pathlib.Path) -> None:
    """Raise CheckpointError where weights hold NaN or infinity, naming the first such tensor."""
    for name, array in flatten(params).items():
        if not jnp.isfinite(array).all():
            raise CheckpointError(f"{where}: tensor {name} holds NaN or infinity; name another checkpoint of the run")


def _restore(folder: pathlib.Path, model: ModelConfig) -> Params:
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        stored = ocp.StandardCheckpointHandler().metadata(folder / POLICY).tree
        target = flatten(_abstract(model, stored))
        restored = checkpointer.restore(folder, args=ocp.args.Composite(**{POLICY: ocp.args.StandardRestore(target)}))
    except CheckpointError:
        raise
    except Exception as error:  # as in `Checkpoints.restore`
        raise CheckpointError(f"its weights cannot be read ({str(error).splitlines()[0]})") from error
    params: Params = unflatten(abstract_params(model), restored[POLICY])
    check_finite(params, folder)
    return params


def _abstract(model: ModelConfig, stored: Mapping[str, Any]) -> Params:
    """Return what the weights are restored into. Raise CheckpointError where they are not the model's.

    Args:
      stored: for each array its shape and dtype on disk. No size that the configuration names is believed before.
    """
    deepest = f"blocks.{model.num_layers - 1}."
    if not any(name.startswith(deepest) for name in stored):
        raise CheckpointError(f"it has no weights {deepest}*, and its configuration says num_layers={model.num_layers}")
    abstract = abstract_params_on(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()), model)
    for name, wanted in flatten(abstract).items():
        there = f"{stored[name].dtype} {stored[name].shape}" if name in stored else "missing"
        if there != (here := f"{wanted.dtype} {wanted.shape}"):
            raise CheckpointError(f"tensor {name} is {there}, and its configuration says {here}")
    return abstract
