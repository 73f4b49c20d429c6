"""Training speed on this machine: SFT steps and GRPO steps, ours and others', in turns, against the machine's limit.

The machine's speed moves from minute to minute. So the contestants take turns, a pass each, and are compared by the
median over the turns of the ratio of one turn's times. The first turn warms up and is not counted.
"""

import contextlib
import dataclasses
import functools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.bench.replay import make_replays, replay
from apr_jax.bench.training_peers import Peer, PeerError
from apr_jax.config import Config, OptimizerConfig
from apr_jax.data.pipeline import tokenize, train_iterator
from apr_jax.data.tokenizer import Tokenizer, config_tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Decode, Open, Program, RolloutKey
from apr_jax.model.params import Params, init_params, num_params
from apr_jax.model.weights.hf import save_hf
from apr_jax.reasoning.settings import banned_tokens
from apr_jax.tasks.generation import demonstrate, generate_problems
from apr_jax.train.optimizer import make_optimizer, schedule
from apr_jax.train.rl.advantage import normalised
from apr_jax.train.rl.sample import Scored
from apr_jax.train.rl.update import Updater
from apr_jax.train.scorer import to_mesh
from apr_jax.train.sft import make_sft_step, normalise, sft_options, sft_recomputation
from apr_jax.train.state import create_state

Rows = dict[str, np.ndarray]
Contestant = Callable[[], Mapping[str, Any]]  # one pass: "seconds" and "losses" of its steps
OURS = "apr_jax"

_wait: Callable[[Any], Any] = jax.block_until_ready

_SFT_STEPS = 6  # of a pass
_PROBLEMS = 400  # whose demonstrations the rows are packed from
_SAME_LOSS = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """The settings of a benchmark."""

    peers: Sequence[str]  # names of `peers.PEERS` that take part
    turns: int  # counted ones
    seconds_limit: float  # of one peer
    say: Callable[[str], None]  # is told what is measured now


def take_turns(contestants: Mapping[str, Contestant], turns: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run passes in turns. Returns by name each counted turn's seconds of a step, the last losses, or an `error`.

    A pass counts with the median of its steps, because the first step finds the caches of the contestant before.
    """
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in contestants}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            if "error" in rows[name]:
                continue
            say(f"turn {turn} of {turns}: {name}")
            try:
                done = run()
            except PeerError as error:
                rows[name]["error"] = str(error)
                continue
            if turn:
                rows[name]["seconds"].append(statistics.median(done["seconds"]))
            rows[name] |= {key: done[key] for key in ("losses", "contention") if key in done}
    return rows


def compare(rows: Mapping[str, Mapping[str, Any]], references: Sequence[str], tokens: float) -> dict[str, Any]:
    """Add to each row its median step, tokens/s, and how many times as long as each reference's a step took.

    `over` has by reference the median, the least and the most over the turns.
    """
    compared: dict[str, Any] = {}
    for name, row in rows.items():
        compared[name] = dict(row)
        if row["seconds"]:
            median = statistics.median(row["seconds"])
            over = {}
            for reference in references:
                pairs = zip(row["seconds"], rows[reference]["seconds"], strict=False)
                ratios = [theirs / mine for theirs, mine in pairs]
                over[reference] = [statistics.median(ratios), min(ratios), max(ratios)]
            compared[name] |= {"median_seconds": median, "tokens_per_second": tokens / median, "over": over}
    return compared


def packed_rows(config: Config, tokenizer: Tokenizer, batches: int) -> list[Rows]:
    """Make batches of an SFT run's rows, with weights that sum to 1."""
    problems = generate_problems(config, "train")
    demonstrations = [
        demonstrate(
            problem,
            random.Random(f"{config.seed}/benchmark/{index}"),
            config.task,
            config.data.method,
            config.data.condition_on_budget,
            lambda text: len(tokenizer.encode(text)),
        )
        for index, problem in zip(range(_PROBLEMS), problems, strict=False)
    ]
    rows_per_batch = config.sft.rows_per_step
    options = sft_options(config)
    calls = tokenize(demonstrations, tokenizer, options)
    rows = train_iterator(calls, tokenizer, options, rows_per_batch=rows_per_batch, seed=config.seed)
    taken = [dict(next(rows)) for _ in range(batches)]
    return [{**batch, "weights": normalise(batch["weights"])} for batch in taken]


def training_flops(config: Config, segment_ids: np.ndarray) -> float:
    """Count the floating-point operations of a step's forward and backward pass over rows `[B, T]` without padding.

    Six per matrix element and token, and 12 H N L per pair of a token and one that it sees (Kaplan et al. 2020, table
    1, with the factor of causality counted exactly). Neither recomputation nor the optimiser is counted.
    """
    model = config.model
    matrices = num_params(model).non_embedding + model.embed_dim * model.vocab_size
    lengths = [
        int(count)
        for row in segment_ids
        for segment, count in zip(*np.unique(row, return_counts=True), strict=True)
        if segment
    ]
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return 6.0 * matrices * sum(lengths) + 12.0 * model.head_dim * model.num_heads * model.num_layers * pairs


def benchmark_sft(config: Config, mesh: Mesh, session: Session) -> dict[str, Any]:
    """Measure SFT steps with AdamW, ours and `hf`'s on the same batches, and ours with the config's own optimizer.

    The learning rate is constant, so losses should agree step by step; `same_model` is true where they do.
    """
    batches = packed_rows(config, config_tokenizer(config), _SFT_STEPS)
    params = init_params(config.model, config.seed)
    adamw = dataclasses.replace(config.sft.optimizer, name="adamw", schedule="constant", warmup_steps=0)
    own = dataclasses.replace(adamw, name=config.sft.optimizer.name)
    contestants: dict[str, Contestant] = {OURS: _sft_pass(config, mesh, adamw, params, batches)}
    if own.name != "adamw":
        contestants[f"{OURS} {own.name}"] = _sft_pass(config, mesh, own, params, batches)
    workload = {
        "batches": [{name: array.tolist() for name, array in batch.items()} for batch in batches],
        "optimizer": dataclasses.asdict(adamw),
    }
    tokens = statistics.fmean(int(np.count_nonzero(batch["segment_ids"])) for batch in batches)
    figures = _measure(session, "hf", contestants, (OURS,), workload, (config, params), tokens)
    rows = figures["contestants"]
    for name, row in rows.items():
        if name.startswith("hf") and "losses" in row:
            gap = max(abs(a - b) for a, b in zip(row["losses"], rows[OURS]["losses"], strict=True))
            row |= {"max_loss_gap": gap, "same_model": gap < _SAME_LOSS}
    flops = statistics.fmean(training_flops(config, batch["segment_ids"]) for batch in batches)
    filled = tokens / batches[0]["segment_ids"].size
    return figures | {"tokens_per_step": tokens, "packing": filled, "flops_per_step": flops}


def _sft_pass(
    config: Config, mesh: Mesh, settings: OptimizerConfig, params: Params, batches: Sequence[Rows]
) -> Contestant:
    optimizer = make_optimizer(settings, config.sft.num_steps)
    rate = schedule(settings, config.sft.num_steps, settings.learning_rate)
    recomputation = sft_recomputation(config.sft, config.model, mesh)
    step = make_sft_step(config.model, optimizer, rate, mesh, recomputation=recomputation)

    def run() -> Mapping[str, Any]:
        state = _wait(create_state(mesh, config.model, optimizer, params))
        seconds, losses = [], []
        for batch in batches:
            start = time.perf_counter()
            state, metrics = step(state, to_mesh(batch, mesh, config.sft.microbatches))
            losses.append(float(metrics["loss"]))
            _wait(state)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "losses": losses}

    return run


def benchmark_grpo(config: Config, mesh: Mesh, session: Session) -> dict[str, Any]:
    """Measure GRPO steps of `grpo.prompts_per_step * group_size` rollouts, rollouts included, ours and TRL's.

    The rollouts have the lengths of the solver's searches, `group_size` of each problem. One contestant of ours gives
    children threads of their own. Another, like TRL, writes each rollout as one thread of as many tokens. Rewards
    alternate between 0 and 1 and there is no reference policy, so one update learns from every rollout.
    """
    tokenizer = config_tokenizer(config)
    params = init_params(config.model, config.seed)
    searches = make_replays(config, tokenizer, config.grpo.prompts_per_step)
    lengths = [
        sum(len(call.tokens) + sum(len(child.tokens) for child in call.children) for call in calls)
        for calls in searches
    ]
    one_thread = _with_room(config, max(len(calls[0].context) for calls in searches) + max(lengths))
    group = config.grpo.group_size
    prompts = [calls[0].context for calls in searches]
    threads = [lambda calls=calls: replay(calls) for calls in searches for _ in range(group)]
    serial = [
        lambda prompt=prompt, length=length: _write(prompt, length)
        for prompt, length in zip(prompts, lengths, strict=True)
        for _ in range(group)
    ]
    contestants: dict[str, Contestant] = {
        OURS: _grpo_pass(config, mesh, tokenizer, params, threads),
        f"{OURS} one thread": _grpo_pass(one_thread, mesh, tokenizer, params, serial),
    }
    workload = {
        "prompts": prompts,
        "lengths": [length for length in lengths for _ in range(group)],
        "group_size": group,
        "vocab_size": config.model.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "optimizer": dataclasses.asdict(config.grpo.optimizer),
    }
    tokens = float(sum(lengths) * group)
    figures = _measure(session, "trl", contestants, tuple(contestants), workload, (one_thread, params), tokens)
    return figures | {
        "rollouts": len(threads),
        "generated_tokens": tokens,
        "tokens_per_rollout": {"mean": statistics.fmean(lengths), "max": max(lengths)},
    }


def _with_room(config: Config, tokens: int) -> Config:
    """Return the configuration for threads of so many tokens: longer contexts and rows, and pages for every lane.

    A row of the update holds several threads, because one or two would leave much of it empty.
    """
    page = config.engine.page_size
    length = -(-tokens // page) * page
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_seq_len=length),
        engine=dataclasses.replace(config.engine, pages=length // page * config.engine.lanes + 1),
        rollout=dataclasses.replace(config.rollout, max_steps=length),
        sft=dataclasses.replace(config.sft, row_len=length),
        grpo=dataclasses.replace(config.grpo, row_len=4 * length, rows_per_microbatch=config.mesh.data),
    )


def _write(prompt: Sequence[int], length: int) -> Program:
    thread = yield Open(prompt)
    yield Decode(thread, (), max_tokens=length)


def _grpo_pass(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, params: Params, programs: Sequence[Callable[[], Program]]
) -> Contestant:
    updater = Updater(config, mesh, tokenizer)
    banned = banned_tokens(tokenizer, config.model.vocab_size)
    engine = Engine(config.model, config.engine, config.rollout, mesh, params=params, banned_tokens=banned)
    engine.warm_up()
    group = config.grpo.group_size
    keys = [RolloutKey(index // group, index % group) for index in range(len(programs))]
    rewards = [float(index % 2) for index in range(len(programs))]
    advantages = normalised(config.grpo, rewards).tolist()

    def run() -> Mapping[str, Any]:
        state = _wait(create_state(mesh, config.model, updater.optimizer, params))
        start = time.perf_counter()
        engine.set_params(state.params)
        rollouts = engine.run(
            [(key, program()) for key, program in zip(keys, programs, strict=True)], seed=config.seed, temperature=1.0
        )
        sequences = updater.sequences(
            [
                Scored(None, rollout, reward > 0, reward, advantage, np.ones(len(rollout.calls)))
                for rollout, reward, advantage in zip(rollouts, rewards, advantages, strict=True)
            ]
        )
        state, metrics, _ = updater.update(state, updater.microbatches(sequences), None)
        _wait(state)
        return {"seconds": [time.perf_counter() - start], "losses": [float(metrics["loss"])]}

    return run


def _measure(
    session: Session,
    peer: str,
    contestants: Mapping[str, Contestant],
    references: Sequence[str],
    workload: Mapping[str, Any],
    model: tuple[Config, Params],
    tokens: float,
) -> dict[str, Any]:
    """Take turns, with every mode of the peer among them where it is asked for; a peer that cannot run says why.

    Args:
      references: contestants of ours that everyone is compared with.
      model: the configuration and weights that the peer is given.
      tokens: of a step.
    """
    entered, about, running = dict(contestants), {}, None
    with contextlib.ExitStack() as stack:
        if peer in session.peers:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="apr_jax-"))
            config, params = model
            save_hf(folder, config.model, params)
            given = {**workload, "model": folder, "threads": os.cpu_count() or 1, "device": jax.devices()[0].platform}
            try:
                running = stack.enter_context(Peer(peer, given, session.seconds_limit))
            except PeerError as error:
                about["error"] = str(error)
            else:
                about |= {"version": running.version, "method": running.method}
                entered |= {f"{peer} {mode}": functools.partial(running.run, mode) for mode in running.modes}
        rows = compare(take_turns(entered, session.turns, session.say), references, tokens)
    measured = [name for name in entered if name not in contestants and "median_seconds" in rows[name]]
    if measured:
        about["fastest"] = min(measured, key=lambda name: rows[name]["median_seconds"])
    return {"contestants": rows, **({peer: about} if about else {})}
