"""Children that begin from a fork of their parent (ThreadWeaver), as a dialect may say, through both test engines."""

from types import MappingProxyType

import pytest

from apr_jax.engine.threads import Path, RolloutKey
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END
from apr_jax.tasks.nested_sums import Adaptive, NestedSums, read_sum
from tests.reasoning.fixtures import TOKENIZER, TextScript, settings
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.scripted_engine import ScriptedEngine


class Forking(Adaptive):
    """Nested sums whose children see all that their parents have written."""

    children = "fork"


class ForkingSums(NestedSums):
    """The task with that dialect."""

    dialects = MappingProxyType({"adaptive": Forking()})


ROOT = f"[[3+4]*5]-[2*8]=\n{CALL_BEGIN}[3+4]*5=\n2*8=\n{CALL_END}"
CHILD = f"{CALL_BEGIN}3+4=\n{CALL_END}"
SCRIPT: dict[Path, list[str]] = {
    (): [ROOT.partition("\n")[2], "5-6=9\n"],
    (0, 0): [CHILD, "7*5=5\n"],
    (0, 0, 0, 0): ["3+4=7\n"],
    (0, 1): ["2*8=6\n"],
}


def run(engine):
    asked = settings(task=ForkingSums(), max_depth=2, max_children=2, max_spawns=1)
    (rollout,) = engine.run([(RolloutKey(0, 0), adaptive(read_sum("[[3+4]*5]-[2*8]"), asked))])
    return rollout


def test_a_child_begins_after_all_that_its_parent_has_written():
    rollout = run(ScriptedEngine(TextScript(SCRIPT)))
    assert (rollout.result.answer, rollout.result.status) == ("9", "answered")
    assert (rollout.result.num_children, rollout.result.child_reasons) == (3, ())
    contexts = {call.path: TOKENIZER.decode(call.context.tolist()) for call in rollout.calls}  # of the last call
    assert contexts[(0, 1)] == ROOT + "2*8=\n"
    assert contexts[(0, 0, 0, 0)] == ROOT + "[3+4]*5=\n" + CHILD + "3+4=\n"
    assert contexts[(0, 0)] == ROOT + "[3+4]*5=\n<Sub Searches>\n7\n<End Sub Searches>\n"


@pytest.mark.parametrize(("lanes", "pages"), [(1, 20), (4, 60)])
def test_the_engine_runs_them_as_the_script_does(lanes, pages):
    forced = run(ForcedEngine(TextScript(SCRIPT), lanes=lanes, max_seq_len=128, pages=pages))
    scripted = run(ScriptedEngine(TextScript(SCRIPT)))
    assert forced.result == scripted.result
    assert [(c.path, c.context.tolist(), c.tokens.tolist()) for c in forced.calls] == [
        (c.path, c.context.tolist(), c.tokens.tolist()) for c in scripted.calls
    ]
    if lanes > 1:
        anew = sum(call.context.size for call in forced.calls)
        assert forced.work.prefilled < anew / 2, "what a parent holds is shared, not prefilled anew"
