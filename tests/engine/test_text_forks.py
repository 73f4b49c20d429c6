"""The text dialect on the real engine: a random policy over pieces of tags spawns, forks and joins.

No tag is a token. Children are forks of their parents, whose pages they share.
"""

import pytest

from apr_jax.engine.thread_cache import ThreadCache
from apr_jax.engine.threads import RolloutKey, StopReason
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.tasks.base import Task
from apr_jax.tasks.text_dialect import TextDialect, TextForm
from tests.engine.helpers import all_calls, assert_close, make_engine
from tests.engine.test_programs import same
from tests.reasoning.fixtures import settings

FIRST, SECOND = "<thread 1>\nask\n</thread>\n", "<thread 2>\nask\n</thread>\n"
# Ids from 3 on; the policy writes the five after "ask". They cut the mark of a spawn's end, or hold more than it.
PIECES = ["", "", "", "ask\n", f"<spawn>\n{FIRST}{SECOND}</spa", f"<spawn>\n{FIRST}</spa", "wn>\n", "wn>\nb\n"]
PIECES += [
    "<result>\na\n</result>\n",
    "<thread 1>\n",
    "<thread 2>\n",
    "\n",
    *"<>/ abcdefghijklmnopqrstuvwxyz0123456789_",
]


class PieceTokenizer:
    """Takes the longest piece at each place. Lines and texts are the same to it."""

    vocab_size, pad_id, bos_id, eos_id, eos_ids, num_bos, join_ids = len(PIECES), 0, 1, 2, (2,), 1, ()

    def encode(self, text):
        ids = []
        while text:
            best = max((i for i in range(3, len(PIECES)) if text.startswith(PIECES[i])), key=lambda i: len(PIECES[i]))
            ids.append(best)
            text = text[len(PIECES[best]) :]
        return ids

    def encode_prompt(self, text):
        return [self.bos_id, *self.encode(text)]

    def encode_continuation(self, text, before):
        return self.encode(text)

    def mark_id(self, mark):
        return None

    def decode(self, ids):
        return "".join(PIECES[index] for index in ids)

    def token_bytes(self, ids, before=()):
        return [PIECES[index].encode() for index in ids]


class Asking(TextForm):
    def question(self, problem):
        return "ask\n" * 7  # longer than two pages

    def work(self, problem, rng, section):
        raise NotImplementedError


def task_with(children):
    class Answering(Task):
        dialects = {"adaptive": TextDialect(Asking(), children=children, joins="texts")}  # noqa: RUF012

        sampler = verify = describe = read_problem = None

    return Answering()


TOKENIZER = PieceTokenizer()
ALLOWED = range(4, 9)
BANNED = tuple(sorted({*range(64)} - {2, *ALLOWED}))


def run(children, **sizes):
    engine = make_engine(banned=BANNED, prefix_reuse=False, lanes=8, pages=400, **sizes)
    asked = settings(task=task_with(children), tokenizer=TOKENIZER, max_depth=2, max_children=3, max_spawns=2)
    programs = [(RolloutKey(problem, 0), adaptive(problem, asked)) for problem in range(96)]
    rollouts = engine.run(programs, seed=1, temperature=3.0)
    engine._scheduler.check()
    return rollouts


@pytest.fixture(scope="module")
def forked():
    return run("fork")


def test_policies_spawn_and_answer_without_a_token_for_any_tag(forked):
    stops = [call.stop for call in all_calls(forked)]
    assert sum(stop.reason is StopReason.STRING for stop in stops) >= 40
    assert sum(stop.excess > 0 for stop in stops) >= 10
    children = sum(rollout.result.num_children for rollout in forked)
    assert children >= 20
    assert {rollout.result.reason for rollout in forked} >= {"", "no_result", "malformed_result"}


def test_forks_begin_with_all_their_parent_wrote_up_to_the_mark(forked):
    spawned = [rollout for rollout in forked if rollout.result.num_children]
    for rollout in spawned:
        for call in (call for call in rollout.calls if call.path):
            text = TOKENIZER.decode(call.context.tolist())
            if call.context.tolist()[0] == TOKENIZER.bos_id and "<join>" not in text:
                assert text.startswith("ask\n" * 7)
                assert text.endswith(f"</spawn>\n<thread {call.path[-1] + 1}>\n")


def test_forks_share_their_parents_pages(forked, monkeypatch):
    """Without sharing every fork computes all that its parent holds anew; the rollouts are the same."""
    monkeypatch.setattr(ThreadCache, "fork", lambda self, parent, child: None)
    alone = run("fork")
    same(alone, forked)
    inherited = 0
    for one, other in zip(alone, forked, strict=True):
        assert_close(one, other)
        first = {call.path: call for call in reversed(other.calls)}
        inherited += sum(len(call.context) - 2 for path, call in first.items() if path)
    saved = sum(rollout.work.prefilled for rollout in alone) - sum(rollout.work.prefilled for rollout in forked)
    assert 0.8 * inherited < saved <= inherited


def test_visits_of_any_length_give_the_same(forked):
    single = run("fork", steps_per_visit=1)
    same(single, forked)
    for one, other in zip(single, forked, strict=True):
        assert_close(one, other)
        assert one.work.decoded <= other.work.decoded
