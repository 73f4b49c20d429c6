"""What a rollout earns: a right answer, less what it took to get there."""

from collections.abc import Sequence

from apr_jax.config import RewardConfig
from apr_jax.engine.threads import Rollout


def compose(rollouts: Sequence[Rollout], correct: Sequence[bool], prices: RewardConfig) -> tuple[float, ...]:
    """The reward of each rollout.

    reward = correct - (sequential_token_price * S + token_price * T + thread_price * C)

    S is the engine's measured critical path: tokens along the longest causal chain (a child starts at its parent's
    clock, a join waits for the latest). T counts the tokens of all threads, those of cancelled children included. C
    counts the threads below the root that wrote a token. `correct` is 1 or 0.

    Unless `failures_pay`, a reward is at least 0: a wrong answer earns 0 whatever it cost. Otherwise the cheapest way
    to fail, which is to give up at once, has the best advantage in a group that solves nothing.
    """
    rewards = [float(right) - cost(rollout, prices) for rollout, right in zip(rollouts, correct, strict=True)]
    return tuple(rewards if prices.failures_pay else [max(reward, 0.0) for reward in rewards])


def cost(rollout: Rollout, prices: RewardConfig) -> float:
    """What a rollout's tokens and threads are priced at."""
    tokens = sum(len(call.tokens) for call in rollout.calls)
    children = len({call.path for call in rollout.calls} - {()})
    return (
        prices.sequential_token_price * rollout.sequential_tokens
        + prices.token_price * tokens
        + prices.thread_price * children
    )
