"""From the rewards of a group to advantages (host, float64)."""

from collections.abc import Sequence

import numpy as np

from apr_jax.config import GRPOConfig


def normalised(config: GRPOConfig, rewards: Sequence[float]) -> np.ndarray:
    """Return (r - mean) / (std + eps) within each group, with the population's std (arXiv 2402.03300, section 4.1.2).

    Args:
      rewards: one a rollout; the `config.group_size` rollouts of a group lie next to each other.
    Returns: float64 [num rollouts], exactly 0 in a group whose rewards are all equal.
    """
    rewards_RG = _grouped(config, rewards)
    centred_RG = rewards_RG - rewards_RG.mean(axis=1, keepdims=True)
    return _without_ties(rewards_RG, centred_RG / (rewards_RG.std(axis=1, keepdims=True) + config.advantage_eps))


def centred(config: GRPOConfig, rewards: Sequence[float]) -> np.ndarray:
    """Return r - mean within each group (arXiv 2503.20783, section 3.2); arguments as `normalised`."""
    rewards_RG = _grouped(config, rewards)
    return _without_ties(rewards_RG, rewards_RG - rewards_RG.mean(axis=1, keepdims=True))


def _grouped(config: GRPOConfig, rewards: Sequence[float]) -> np.ndarray:
    if len(rewards) % config.group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {config.group_size}")
    return np.asarray(rewards, np.float64).reshape(-1, config.group_size)


def _without_ties(rewards_RG: np.ndarray, advantages_RG: np.ndarray) -> np.ndarray:
    equal_R1 = np.ptp(rewards_RG, axis=1, keepdims=True) == 0
    return np.where(equal_R1, 0.0, advantages_RG).reshape(-1)
