"""Reading a policy from any folder or file that holds one."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from apr_jax.checkpoints.identity import POLICY, find_policy
from apr_jax.checkpoints.integrity import CheckpointError, check_files, read_meta
from apr_jax.checkpoints.reference import Name, load_reference
from apr_jax.checkpoints.trees import flatten, unflatten
from apr_jax.config import ConfigError, LoraConfig, MeshConfig, ModelConfig
from apr_jax.config_dict import read_lora, read_model
from apr_jax.model.lora import ALL_WEIGHTS, Trained, abstract_trained, make_merge, trained_shardings
from apr_jax.model.params import Params
from apr_jax.model.placement import abstract_params_on, with_sharding
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
        lora = _adapters_of(config)
        trained = _restore(found.path, model, lora)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{found.path} is damaged: {error}. Name another checkpoint of the run.") from error
    base = _load_base(found.path, model) if lora.rank else None
    return model, make_merge(_one_device(), model, lora)(base, trained), config


def load_adapters(path: pathlib.Path) -> tuple[pathlib.Path, LoraConfig, Trained]:
    """Load the adapters that a checkpoint holds, with its folder. Raise ConfigError where it has none."""
    found = find_policy(path)
    lora = _adapters_of(found.config) if found.is_checkpoint else ALL_WEIGHTS
    if not lora.rank or found.config is None:
        raise ConfigError(f"{path}: there are no adapters; name a run or checkpoint that was trained with lora.rank")
    check_files(found.path)
    return found.path, lora, _restore(found.path, read_model(found.config["model"]), lora)


def check_finite(params: Trained, where: pathlib.Path) -> None:
    """Raise CheckpointError where weights hold NaN or infinity, naming the first such tensor."""
    for name, array in flatten(params).items():
        if not jnp.isfinite(array).all():
            raise CheckpointError(f"{where}: tensor {name} holds NaN or infinity; name another checkpoint of the run")


def _adapters_of(config: Mapping[str, Any] | None) -> LoraConfig:
    """Read the adapters that a checkpoint was trained with. One without the section holds all weights."""
    return ALL_WEIGHTS if config is None or "lora" not in config else read_lora(config["lora"])


def _one_device() -> Mesh:
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices())


def _load_base(folder: pathlib.Path, model: ModelConfig) -> Params:
    """Load the policy that a checkpoint's adapters belong to: it lies in the same run's folder."""
    name: Name = "reference" if read_meta(folder)["phase"] == "grpo" else "base"
    base = folder.parents[1] / name
    if not base.exists():
        raise CheckpointError(f"{folder}: its adapters belong to {base}, which is missing; put it back")
    check_files(base)
    params: Params = load_reference(folder.parents[2], abstract_params_on(_one_device(), model), name)
    check_finite(params, base)
    return params


def _restore(folder: pathlib.Path, model: ModelConfig, lora: LoraConfig) -> Trained:
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        stored = ocp.StandardCheckpointHandler().metadata(folder / POLICY).tree
        abstract = _abstract(model, lora, stored)
        target = flatten(abstract)
        restored = checkpointer.restore(folder, args=ocp.args.Composite(**{POLICY: ocp.args.StandardRestore(target)}))
    except CheckpointError:
        raise
    except Exception as error:  # as in `Checkpoints.restore`
        raise CheckpointError(f"its weights cannot be read ({str(error).splitlines()[0]})") from error
    trained = unflatten(abstract, restored[POLICY])
    check_finite(trained, folder)
    return trained


def _abstract(model: ModelConfig, lora: LoraConfig, stored: Mapping[str, Any]) -> Trained:
    """Return what the weights are restored into. Raise CheckpointError where they are not the model's.

    Args:
      stored: for each array its shape and dtype on disk. No size that the configuration names is believed before.
    """
    deepest = f"blocks.{model.num_layers - 1}."
    if not any(name.startswith(deepest) for name in stored):
        raise CheckpointError(f"it has no weights {deepest}*, and its configuration says num_layers={model.num_layers}")
    shardings = trained_shardings(_one_device(), model, lora)
    abstract = jax.tree.map(with_sharding, abstract_trained(model, lora), shardings)
    for name, wanted in flatten(abstract).items():
        there = f"{stored[name].dtype} {stored[name].shape}" if name in stored else "missing"
        if there != (here := f"{wanted.dtype} {wanted.shape}"):
            raise CheckpointError(f"tensor {name} is {there}, and its configuration says {here}")
    return abstract
