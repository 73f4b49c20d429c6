"""Where a folder states several EOS ids, each of them ends a thread of any method, with the same result."""

import pytest

from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.engine.threads import RolloutKey
from apr_jax.evaluation.metrics import record_rollout
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.settings import banned_tokens
from apr_jax.train.rl.credit import used_threads
from tests.reasoning.fixtures import MODEL, SMALL, TOKENIZER, Replay, demonstrations, settings
from tests.reasoning.scripted_engine import ScriptedEngine

SECOND = TOKENIZER.pad_id  # which has no text either


class TwoStops(BuiltinTokenizer):
    """The built-in vocabulary with a second EOS."""

    def __init__(self):
        super().__init__()
        self.eos_ids = (self.eos_id, SECOND)


class EndsOtherwise(Replay):
    """Demonstrations whose threads end in the second EOS."""

    def __call__(self, path, tokens):
        return [SECOND if token == TOKENIZER.eos_id else token for token in super().__call__(path, tokens)]


@pytest.mark.parametrize("method", ["adaptive", "serial", "direct", "pasta"])
def test_each_stop_ends_a_thread(method):
    two, solved = TwoStops(), 0
    for demo in demonstrations(SMALL, method, 12):
        records = []
        for replay, tokenizer in ((Replay([demo]), TOKENIZER), (EndsOtherwise([demo]), two)):
            program = make_program(method, demo.problem, settings(tokenizer=tokenizer))
            (rollout,) = ScriptedEngine(replay).run([(RolloutKey(0, 0), program)])
            record = record_rollout(
                demo.problem, rollout, tokenizer, MODEL, method=method, keep_calls=True, task=settings().task
            )
            used = used_threads(rollout, tokenizer, settings().task).tolist()
            records.append({key: value for key, value in record.items() if "_ms" not in key} | {"used": used})
        one, other = records
        for record in records:
            for call in record["calls"]:
                call.pop("start_ms"), call.pop("end_ms")
        assert one == other
        solved += one["correct"]
    assert solved


def test_no_stop_is_banned():
    assert SECOND in banned_tokens(TOKENIZER, TOKENIZER.vocab_size)
    assert SECOND not in banned_tokens(TwoStops(), TOKENIZER.vocab_size)
