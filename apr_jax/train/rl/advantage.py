"""From the rewards of a group to advantages (host, float64)."""

from collections.abc import Sequence

import numpy as np

from apr_jax.config import GRPOConfig

_ROUNDING = 1e-12  # relative, of sums of thousands of terms


def normalised(config: GRPOConfig, rewards: Sequence[float]) -> np.ndarray:
    """Return (r - mean) / (std + eps) within each group, with the population's std (arXiv 2402.03300, section 4.1.2).

    Args:
      rewards: one a rollout; the `config.group_size` rollouts of a group lie next to each other.
    Returns: float64 [num rollouts], exactly 0 in a group without a signal (`has_signal`).
    """
    rewards_RG = _grouped(config, rewards)
    centred_RG = rewards_RG - rewards_RG.mean(axis=1, keepdims=True)
    scale_R1 = rewards_RG.std(axis=1, keepdims=True) + config.advantage_eps
    return _with_signal(rewards_RG, np.divide(centred_RG, scale_R1, where=scale_R1 > 0, out=np.zeros_like(centred_RG)))


def centred(config: GRPOConfig, rewards: Sequence[float]) -> np.ndarray:
    """Return r - mean within each group (arXiv 2503.20783, section 3.2); arguments as `normalised`."""
    rewards_RG = _grouped(config, rewards)
    return _with_signal(rewards_RG, rewards_RG - rewards_RG.mean(axis=1, keepdims=True))


def has_signal(rewards_RG: np.ndarray) -> np.ndarray:
    """Return bool [groups], True where a group's rewards differ by more than rounding.

    Equal costs that were added up in another order differ in their last bits, and the division by their standard
    deviation would make advantages of about 1 of that.
    """
    return np.ptp(rewards_RG, axis=1) > _ROUNDING * (1 + np.abs(rewards_RG).max(axis=1))


def _grouped(config: GRPOConfig, rewards: Sequence[float]) -> np.ndarray:
    if len(rewards) % config.group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {config.group_size}")
    return np.asarray(rewards, np.float64).reshape(-1, config.group_size)


def _with_signal(rewards_RG: np.ndarray, advantages_RG: np.ndarray) -> np.ndarray:
    return np.where(has_signal(rewards_RG)[:, None], advantages_RG, 0.0).reshape(-1)
