"""One adaptive program on three tasks in words, with tokenizers that know no mark: byte-level and Llama-like.

The script writes on after every mark, glued to it where the tokenizer merges so. What it writes too much is trimmed.
"""

import dataclasses
import itertools
import random
from typing import Any

import pytest

from apr_jax.data.tokenized import TokenizedCalls, prompts_of, tokenize_calls
from apr_jax.data.tokenizer import Spelling, load_tokenizer
from apr_jax.engine.threads import RolloutKey, StopReason
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.tasks import TASKS
from apr_jax.tasks.countdown.rules import sample_problem
from apr_jax.tasks.generation import demonstrate
from apr_jax.tasks.nested_sums import NestedSumsConfig, sample
from tests.configs import LAPTOP_TASK
from tests.data.made_tokenizers import byte_level_json, llama_like_json
from tests.reasoning.fixtures import settings
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.scripted_engine import ScriptedEngine

NAMES = ("nested_sums_text", "nested_sums_fork", "countdown_text")
MORE = "\nCompute 1+1 modulo 10.\n"  # what is written after a spawn, and must be as if it never was


def demonstrations(name, count):
    countdown = name == "countdown_text"
    section: Any = NestedSumsConfig(name=name, depth=3)
    if countdown:
        section = dataclasses.replace(LAPTOP_TASK, name=name, num_numbers=4, spawn_depth=2)
    for index in range(count):
        rng = random.Random(f"{name}/{index}")
        problem = sample_problem(rng, section) if countdown else sample(rng, 3)
        yield demonstrate(problem, rng, section, "adaptive", False)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    texts = [
        call.context + call.completion for name in NAMES for demo in demonstrations(name, 8) for call in demo.calls
    ]
    glued = [text + MORE for text in texts] + ["</spawn>\n\nCompute", ">\nC"] * 50
    return {
        "byte_level": str(byte_level_json(tmp_path_factory.mktemp("bytes"), glued, ["<s>", "</s>"])),
        "llama_like": str(llama_like_json(tmp_path_factory.mktemp("llama"), glued)),
    }


@pytest.fixture(params=[*itertools.product(("byte_level", "llama_like"), ("lines", "whole"))], ids="-".join)
def tokenizer(request, paths):
    kind, encoding = request.param
    return load_tokenizer(paths[kind], Spelling(encoding=encoding, joins=("<join>\n",)))


class Script:
    """Writes what a demonstration's thread wrote after the same text, and after a spawn a little more."""

    def __init__(self, tokenizer, demo):
        self._tokenizer, self._texts = tokenizer, {call.context: call for call in demo.calls}
        self.contexts = []

    def __call__(self, path, tokens):
        call = self._texts[self._tokenizer.decode(tokens)]
        self.contexts.append(list(tokens))
        written = call.completion + (MORE if call.ends_in_spawn else "")
        return [*self._tokenizer.encode_continuation(written, tokens), self._tokenizer.eos_id]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_program_runs_them_all(name, tokenizer, request):
    excess = 0
    for index, demo in enumerate(demonstrations(name, 5)):
        asked = settings(task=TASKS[name], tokenizer=tokenizer, max_depth=3, max_children=3, max_spawns=1)
        rollouts = []
        for engine in (
            ScriptedEngine(Script(tokenizer, demo)),
            ForcedEngine(Script(tokenizer, demo), lanes=1 + index % 3, max_seq_len=4096, pages=900),
        ):
            (rollout,) = engine.run([(RolloutKey(0, 0), adaptive(demo.problem, asked))])
            rollouts.append(rollout)
        scripted, forced = rollouts
        assert scripted.result == forced.result
        assert scripted.result.status == "answered"
        assert TASKS[name].verify(scripted.result.answer, demo.problem).correct
        assert scripted.result.num_children == sum(call.depth > 0 for call in demo.calls if not call.ends_in_spawn)
        assert [(c.path, c.context.tolist(), c.tokens.tolist(), c.stop) for c in scripted.calls] == [
            (c.path, c.context.tolist(), c.tokens.tolist(), c.stop) for c in forced.calls
        ]
        excess += sum(call.stop.excess > 0 for call in scripted.calls)
        written = sorted(tokenizer.decode(call.context.tolist()) for call in scripted.calls)
        assert written == sorted(call.context for call in demo.calls), "contexts are those of the demonstration"
        for call in scripted.calls:
            assert (call.stop.reason is StopReason.STRING) == (call.stop.string == "</spawn>\n")
    assert (excess > 0) == ("byte_level-whole" in request.node.name), "its tokens run across the ends of lines"


@pytest.mark.parametrize("name", NAMES)
def test_training_sees_the_tokens_that_threads_hold(name, paths):
    """Where lines are encoded on their own, token for token: contexts, and what is written up to the mark."""
    tokenizer = load_tokenizer(paths["byte_level"], Spelling(joins=("<join>\n",)))
    for demo in demonstrations(name, 4):
        asked = settings(task=TASKS[name], tokenizer=tokenizer, max_depth=3, max_children=3, max_spawns=1)
        (rollout,) = ScriptedEngine(Script(tokenizer, demo)).run([(RolloutKey(0, 0), adaptive(demo.problem, asked))])
        trained = TokenizedCalls(tokenize_calls([demo], tokenizer, row_len=10_000))
        rows = {tuple(trained.tokens[trained.starts[i] : trained.starts[i + 1]].tolist()) for i in range(len(trained))}
        assert rows == {(*call.context.tolist(), *call.tokens.tolist()) for call in rollout.calls}
        assert len(prompts_of(demo.calls)) == len(demo.calls)


def test_a_thread_that_writes_a_join_is_malformed(paths):
    tokenizer = load_tokenizer(paths["llama_like"], Spelling(joins=("<join>\n",)))
    (demo,) = demonstrations("nested_sums_text", 1)

    def write(path, tokens):
        return [*tokenizer.encode_continuation("3\n<join>\n7\n", tokens), tokenizer.eos_id]

    asked = settings(task=TASKS["nested_sums_text"], tokenizer=tokenizer, max_depth=3)
    (rollout,) = ScriptedEngine(write).run([(RolloutKey(0, 0), adaptive(demo.problem, asked))])
    assert (rollout.result.status, rollout.result.reason) == ("malformed", "wrote_join")
    assert tokenizer.decode(rollout.calls[0].tokens.tolist()) == "3\n<join>\n"


def test_text_that_cannot_be_written_is_malformed_and_no_bug(paths):
    """A child's result with what a tokenizer cannot spell, and a task that would leave its message in a chat."""
    tokenizer = load_tokenizer(paths["byte_level"], Spelling(joins=("<join>\n",)))
    demo = next(demo for demo in demonstrations("nested_sums_text", 5) if demo.calls[0].ends_in_spawn)
    first, spawn = demo.calls[0].context, demo.calls[0].completion

    class Refusing:
        def __init__(self, **methods):
            self.__dict__.update(methods)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    def write(path, tokens):
        text = spawn if not path else "<result>\n7 \u2603\n</result>\n"
        return [*tokenizer.encode_continuation(text, tokens), tokenizer.eos_id]

    def no_snow(text, before):
        if "\u2603" in text:
            raise ValueError("no snowman")
        return tokenizer.encode_continuation(text, before)

    def no_child(text):
        if text != first:
            raise ValueError("no other prompt")
        return tokenizer.encode_prompt(text)

    def outcome(asked):
        program = adaptive(demo.problem, settings(task=TASKS["nested_sums_text"], tokenizer=asked, max_spawns=1))
        return ScriptedEngine(write).run([(RolloutKey(0, 0), program)])[0].result

    refused = outcome(Refusing(encode_continuation=no_snow))
    assert (refused.status, refused.reason) == ("malformed", "unwritable_join")
    refused = outcome(Refusing(encode_prompt=no_child))
    assert set(refused.child_reasons) == {"unwritable_task"}
    assert refused.reason == "too_many_spawns"
    with pytest.raises(ValueError, match="no other prompt"):
        outcome(Refusing(encode_prompt=lambda text: no_child("x" + text)))
