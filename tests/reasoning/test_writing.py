"""Text in, text out, played from prepared completions."""

import pytest

from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning.writing import Written, write
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from tests.reasoning.fixtures import TextScript, settings
from tests.reasoning.scripted_engine import ScriptedEngine
from tests.reasoning.test_adaptive import EXPLORED, GOOD, PARENT_WINS, PROMPT, SPAWN


def run(texts, dialect=None, *, max_steps=100_000, **changes) -> Written:
    engine = ScriptedEngine(TextScript(texts), max_steps=max_steps)
    program = write(PROMPT, settings(**changes), dialect)
    return engine.run([(RolloutKey(0, 0), program)])[0].result


def test_spawns_are_run_and_joins_stand_in_their_place():
    written = run(GOOD, ADAPTIVE)
    assert written.reason == ""
    assert written.text.startswith(EXPLORED + "<Sub Searches>\n")
    assert written.text.endswith(PARENT_WINS)
    assert "<Calling Sub Searches>" not in written.text


def test_without_a_dialect_a_spawn_is_text_like_any_other():
    assert run({(): [SPAWN + PARENT_WINS]}) == Written(SPAWN + PARENT_WINS, "")


@pytest.mark.parametrize("dialect", [None, ADAPTIVE])
def test_what_was_cut_off_has_a_reason(dialect):
    written = run({(): [EXPLORED]}, dialect, max_steps=3)
    assert written.reason == "max_steps"
    assert 0 < len(written.text) < len(EXPLORED)
    assert EXPLORED.startswith(written.text)


def test_a_malformed_spawn_has_a_reason_and_the_text_stays():
    written = run({(): [EXPLORED + "<Calling Sub Searches>\n1,2\n<End Calling Sub Searches>\n"]}, ADAPTIVE)
    assert written.reason
    assert written.text.startswith(EXPLORED)
