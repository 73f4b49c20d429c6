"""The memory that a trainer keeps on a device beside its engine."""

from jax.sharding import Mesh

from apr_jax.config import Config
from apr_jax.model.placement import abstract_params_on
from apr_jax.parallel.device_memory import local_bytes
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import abstract_state


def trainer_bytes(config: Config, mesh: Mesh) -> int:
    """Return the bytes of GRPO's weights, moments, gradients, reference and base on one device of the trainer's mesh.

    A run without GRPO holds one policy beside its engine. Activations are not counted.
    """
    grpo = config.grpo
    policy = local_bytes(abstract_params_on(mesh, config.model))
    if not grpo.num_steps:
        return policy
    state = abstract_state(mesh, config.model, make_optimizer(grpo.optimizer, grpo.num_steps), config.lora)
    is_kept = grpo.kl_coef > 0 or config.lora.rank > 0  # the policy that GRPO starts from
    return local_bytes(state) + local_bytes(state.params) + is_kept * policy
