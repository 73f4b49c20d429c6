"""A comparison of what a device decodes with a plain forward pass on the CPU, for `launch/accelerator_check.py`.

The reference is the dense forward in float32, without cache, engine or kernel. It scores what the device wrote, so one
difference does not hide the tokens after it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from apr_jax.config import EngineConfig, ModelConfig, RolloutConfig
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Append, Call, Decode, Open, Program, RolloutKey, Truncate
from apr_jax.model.params import Params, graphdef, init_params
from apr_jax.model.sampling import log_probs
from apr_jax.model.views.training import training_rows

Script = Callable[[ModelConfig, int, int, int], list[Program]]  # of a page's size, a thread's most tokens and a seed


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The distance of greedy tokens and their log-probabilities from the reference's."""

    num_tokens: int
    num_other: int  # tokens that differ from the reference's argmax
    max_regret: float  # the reference's best log-probability less that of the token written, at most
    max_difference: float  # the largest distance of a token's log-probability from the reference's
    mean_difference: float

    def within(self, tolerance: float) -> bool:
        """Return True where each token is the best, up to ties, and each log-probability equal, within the tolerance.

        The means must lie within a quarter of the tolerance.
        """
        largest = max(self.max_regret, self.max_difference, 4 * self.mean_difference)
        return self.num_tokens > 0 and largest <= tolerance


def compare(written_T: np.ndarray, logprobs_T: np.ndarray, reference_TV: np.ndarray) -> Agreement:
    """Compare greedy tokens and their log-probabilities with the reference's of the whole vocabulary."""
    own_T, regret_T = _own_and_regret(written_T, reference_TV)
    difference_T = np.abs(own_T - logprobs_T)
    return Agreement(
        len(written_T),
        int((regret_T > 0).sum()),
        float(regret_T.max(initial=0.0)),
        float(difference_T.max(initial=0.0)),
        float(difference_T.mean()) if len(written_T) else 0.0,
    )


def sharp_params(config: ModelConfig, seed: int) -> Params:
    """Make random weights under which the next token depends on what is attended to; fresh ones give an even policy.

    Under these weights a wrong RoPE base moves log-probabilities by several nats.
    """
    scale = 64 / math.sqrt(config.embed_dim)
    return jax.tree.map(lambda w: w * scale if w.ndim > 1 else w, init_params(config, seed))


def decode_greedily(
    model: ModelConfig,
    sizes: EngineConfig,
    rollout: RolloutConfig,
    mesh: Mesh,
    params: Params,
    seed: int,
    script: Script | None = None,
) -> list[Call]:
    """Return what the engine writes for scripted programs, by default those that stop and go on."""
    engine = Engine(model, sizes, rollout, mesh, params=params, banned_tokens=())
    programs = (script or resumed_threads)(model, sizes.page_size, rollout.max_steps, seed)
    keyed = [(RolloutKey(number, 0), program) for number, program in enumerate(programs)]
    return [call for rollout in engine.run(keyed, seed=seed, temperature=0.0) for call in rollout.calls]


def agreement(calls: Sequence[Call], model: ModelConfig, params: Params) -> Agreement:
    """Compare all that greedy calls wrote with the reference on the CPU."""
    tokens = np.concatenate([call.tokens for call in calls])
    logprobs = np.concatenate([call.logprobs for call in calls])
    reference = _reference(model, params, [(call.context, call.tokens) for call in calls])
    return compare(tokens, logprobs, np.concatenate(reference))


def regret(context: Sequence[int], tokens: Sequence[int], model: ModelConfig, params: Params) -> float:
    """Return how much less likely the tokens are than the likeliest ones, in nats a token, by the reference."""
    written_T = np.asarray(tokens)
    (reference_TV,) = _reference(model, params, [(np.asarray(context), written_T)])
    return float(_own_and_regret(written_T, reference_TV)[1].mean())


def _own_and_regret(written_T: np.ndarray, reference_TV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the reference's log-probability of each token written, and how much less that is than its best one."""
    own_T = np.take_along_axis(reference_TV, written_T[:, None], axis=1)[:, 0]
    return own_T, reference_TV.max(axis=1) - own_T


def resumed_threads(model: ModelConfig, page: int, max_steps: int, seed: int) -> list[Program]:
    """Make prompts around the borders of pages; each thread decodes, is cut back, appended to and decoded on."""
    longest, rng = model.max_seq_len // 8, np.random.default_rng(seed)
    lengths = [length for length in (1, page - 1, page, page + 1, 2 * page + 3, longest) if length <= longest]

    def program(prompt: list[int], more: list[int]) -> Program:
        thread = yield Open(prompt)
        yield Decode(thread, ())
        yield Truncate(thread, len(thread.tokens) - max_steps // 4)
        yield Append(thread, more)
        return (yield Decode(thread, ()))

    return [program(_draw(rng, model, length), _draw(rng, model, 5)) for length in lengths]


def prefilled_threads(model: ModelConfig, page: int, max_steps: int, seed: int) -> list[Program]:
    """Make prompts of up to a whole context, each with the few tokens that show what prefill computed."""
    new, rng = min(4, max_steps), np.random.default_rng(seed)
    longest = model.max_seq_len - new

    def program(prompt: list[int]) -> Program:
        thread = yield Open(prompt)
        return (yield Decode(thread, (), max_tokens=new))

    return [
        program(_draw(rng, model, length)) for length in (page, page + 1, longest // 2, longest - page + 1, longest)
    ]


def _draw(rng: np.random.Generator, model: ModelConfig, count: int) -> list[int]:
    return rng.integers(0, model.vocab_size, count).tolist()


def _reference(model: ModelConfig, params: Params, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Compute log-probabilities `[tokens written, V]` of each context and its tokens by float32 forwards on the CPU."""
    model = dataclasses.replace(model, compute_dtype="float32", attention="xla", remat="none")
    width = max(len(context) + len(tokens) for context, tokens in texts)
    cpu = jax.devices("cpu")[0]

    @jax.jit
    def forward(params: Params, tokens_T: jax.Array) -> jax.Array:
        llama = nnx.merge(graphdef(model), params)
        hidden, _ = llama(tokens_T, training_rows(model, jnp.arange(width)))
        return log_probs(llama.logits(hidden), 1.0, jnp.zeros((model.vocab_size,), bool))

    params = jax.device_put(params, cpu)
    scored = []
    for context, tokens in texts:
        tokens_T = np.zeros((width,), np.int32)
        tokens_T[: len(context) + len(tokens)] = [*context, *tokens]
        reference_TV = np.asarray(forward(params, jax.device_put(tokens_T, cpu)))
        first = len(context) - 1
        scored.append(reference_TV[first : first + len(tokens)])
    return scored
