"""The reward of a rollout: 1 for a right answer, less the price of what it took."""

from apr_jax.config import RewardConfig
from apr_jax.engine.threads import Rollout


def reward(rollout: Rollout, correct: bool, prices: RewardConfig) -> float:
    """Return correct - (sequential_token_price * S + token_price * T + thread_price * C).

    S is the engine's measured critical path: tokens along the longest causal chain (a child starts at its parent's
    clock, a join waits for the latest). T counts the tokens of all threads, cancelled children included. C counts the
    threads below the root that wrote a token. `correct` is 1 or 0.

    Unless `prices.failures_pay`, a reward is at least 0, and a wrong answer earns 0 whatever it cost. Otherwise giving
    up at once, the cheapest way to fail, would have the best advantage in a group that solves nothing.
    """
    earned = float(correct) - cost(rollout, prices)
    return earned if prices.failures_pay else max(earned, 0.0)


def cost(rollout: Rollout, prices: RewardConfig) -> float:
    """Return the price of a rollout's tokens and threads."""
    tokens = sum(len(call.tokens) for call in rollout.calls)
    children = len({call.path for call in rollout.calls} - {()})
    return (
        prices.sequential_token_price * rollout.sequential_tokens
        + prices.token_price * tokens
        + prices.thread_price * children
    )
