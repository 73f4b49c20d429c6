"""Whatever is drawn under the grammar is a spawn that the parser and every cap accept, for each kind of tokenizer."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from apr_jax.data.tokenizer import Spelling, load_tokenizer
from apr_jax.engine.constraints import FREE, Registers
from apr_jax.reasoning import adaptive
from apr_jax.reasoning.settings import spawn_gate
from apr_jax.reasoning.spawn_grammar import SpawnGrammar, ThreadGrammar, spawn_grammar
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE, render_spawn
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, JOIN_END, Malformed, SpawnCall
from tests.data.made_tokenizers import byte_level_json, llama_like_json
from tests.reasoning import fixtures
from tests.reasoning.fixtures import TOKENIZER
from tests.train.small import small_config

DIALECT = COUNTDOWN.dialects["adaptive"]
PROMPTS = {
    1: ADAPTIVE.prompt(Problem((2, 3, 4, 5), 24)),
    2: "Moving to Node #0,1\nCurrent State: 24:[4, 5, 6], Operations: ['2*3=6']\n",
}
ROOTS = {1: "0", 2: "0,1"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of the Hugging Face kinds one merges within lines, over indices, levels and nodes; the other spells digits."""
    demos = list(fixtures.demonstrations(fixtures.SMALL, "adaptive", 20))
    texts = [call.context + call.completion for demo in demos for call in demo.calls]
    paths = [
        byte_level_json(tmp_path_factory.mktemp("bytes"), texts, ["<s>", "</s>"]),
        llama_like_json(tmp_path_factory.mktemp("llama"), texts),
    ]
    return [TOKENIZER, *(load_tokenizer(str(path), Spelling(markers=COUNTDOWN.marks)) for path in paths)]


def generated(node_id: str, numbers: str, operation: str, target: int) -> str:
    return f"Generated Node #{node_id}: {target}:[{numbers}] Operation: {operation}\n"


@st.composite
def lines(draw, level: int) -> list[str]:
    """Nodes below the thread's root, some with another target, a single number, an unknown parent, or twice."""
    written = []
    for _ in range(draw(st.integers(0, 12))):
        below = ",".join(str(draw(st.integers(0, 12))) for _ in range(draw(st.integers(1, 2))))
        numbers = draw(st.sampled_from(["4, 5", "4, 6, 7", "24"]))
        operation, target = draw(st.sampled_from(["2+3=5", "6*4=24"])), draw(st.sampled_from([24, 24, 24, 25]))
        written.append(generated(f"{ROOTS[level]},{below}", numbers, operation, target))
        written.append(draw(st.sampled_from(["", "No solution found.\n", trace.NO_SOLUTION + JOIN_END])))
    return written


def draw_spawn(grammar: SpawnGrammar, tokens: list[int], automaton, rng: random.Random, eager: bool) -> int:
    """Appends random choices until the automaton ends. Returns how many lines were written."""
    registers, lines_written = Registers(), 0
    while registers.state != FREE:
        choices = automaton.choices(registers)
        assert 0 < len(choices) <= grammar.gate.num_choices
        go_on = [token for token in choices if token != grammar.tokenizer.mark_id(CALL_END)]
        token = rng.choice(go_on if eager and go_on else choices)
        tokens.append(token)
        lines_written = registers.count
        registers = automaton.step(registers, token)
    return lines_written


@settings(max_examples=120, deadline=None)
@given(st.data(), st.integers(1, 2), st.integers(0, 2), st.sampled_from([1, 3, 16]), st.integers(1, 20))
def test_every_drawn_spawn_is_well_formed(tokenizers, data, level, which, max_children, allowance):
    tokenizer = tokenizers[which]
    grammar = spawn_grammar(tokenizer, DIALECT, max_children)
    asked = fixtures.settings(tokenizer=tokenizer, max_children=max_children, max_depth=2, spawn_grammar=grammar)
    most = min(max_children, allowance)
    held = ThreadGrammar(grammar, level, most)
    rng = random.Random(data.draw(st.integers(0, 1000)))
    tokens = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[level])]
    for line in data.draw(lines(level)):
        tokens += tokenizer.encode(line)
        nodes = ADAPTIVE.spawnable(tokenizer.decode(tokens))
        assert held.is_open(tokens) == bool(nodes)
        if not nodes:
            continue
        spawned = [*tokens, grammar.gate.token]
        number = draw_spawn(grammar, spawned, held.automaton(spawned), rng, eager=data.draw(st.booleans()))
        text = tokenizer.decode(spawned)
        call = adaptive.read_spawn(DIALECT, text, asked, depth=level - 1, spawns=0, allowance=most)
        assert isinstance(call, SpawnCall), f"{call}: {text}"
        assert len(call.names) == number <= most
        assert tokenizer.encode(text) == spawned[1:], "spelt as the tokenizer spells it"
        assert spawned[: len(tokens)] == tokens


@pytest.mark.parametrize("which", range(3))
def test_every_spawn_of_the_demonstrations_can_be_drawn(tokenizers, which):
    tokenizer, spawns = tokenizers[which], 0
    grammar = spawn_grammar(tokenizer, DIALECT, 16)
    for demo in fixtures.demonstrations(fixtures.SMALL, "adaptive", 30):
        for call in demo.calls:
            if not call.ends_in_spawn:
                continue
            context, written = fixtures.call_tokens(call, tokenizer)
            begin = written.index(grammar.gate.token)
            held = ThreadGrammar(grammar, 1, 16)
            assert held.is_open([*context, *written[:begin]])
            automaton, registers = held.automaton([*context, *written[: begin + 1]]), Registers()
            for token in written[begin + 1 :]:
                assert token in automaton.choices(registers)
                registers = automaton.step(registers, token)
            assert registers.state == FREE
            spawns += 1
    assert spawns > 10


def test_nodes_that_may_be_named():
    text = PROMPTS[1] + "".join(
        [
            generated("0,3", "4, 5", "2+3=5", 24),
            generated("0,0", "4, 6", "2*3=6", 24),
            generated("0,3,1", "9", "4+5=9", 24),  # final
            generated("0,0,1", "4, 6", "6*1=6", 24),
            generated("0,1", "4, 5", "2+3=5", 25),  # another target
            generated("0,2", "4, 5", "2+3=5", 24),
            generated("0,2", "4, 6", "2*3=6", 24),  # ambiguous
            generated("0,2,0", "4, 6", "2*3=6", 24),  # its parent is
            generated("1,0", "4, 6", "2*3=6", 24),  # unknown root
            generated("0,3", "4, 5", "2+3=5", 24),
        ]
    )
    assert ADAPTIVE.spawnable(text) == ["0,3", "0,0", "0,0,1"]
    assert ADAPTIVE.spawnable("No prompt.\n" + text) == []
    for node_id in ["0", "0,0", "0,1", "0,2", "0,2,0", "0,3", "0,3,1", "1,0", "0,0,1", "0,9"]:
        parsed = ADAPTIVE.read_spawn(text + render_spawn([node_id]))
        assert isinstance(parsed, SpawnCall) == (node_id in ADAPTIVE.spawnable(text))


def test_of_very_many_nodes_the_latest_that_fit_may_be_named(tokenizers):
    """A tokenizer whose tokens reach over index and node needs edges for each pair: fewer nodes fit."""
    nodes = [f"0,{index}" for index in range(300)]
    named = []
    for tokenizer in tokenizers:
        grammar = spawn_grammar(tokenizer, DIALECT, 16)
        automaton, found = grammar.automaton(nodes, 1, 16), set()
        for seed in range(40):
            tokens: list[int] = []
            draw_spawn(grammar, tokens, automaton, random.Random(seed), eager=True)
            found |= set(tokenizer.decode(tokens).replace("\n", "").split("#")[1:])
        ids = {line.split("<")[0] for line in found}
        assert ids <= set(nodes[-len(ids) :]), "the latest"
        named.append(len(ids))
    assert named[0] == 32
    assert min(named) >= 1


def test_a_thread_at_its_limits_is_closed():
    asked = fixtures.settings(max_depth=2, max_spawns=1, spawn_grammar=spawn_grammar(TOKENIZER, DIALECT, 16))
    assert not adaptive.thread_grammar(asked, depth=1, spawns=0, allowance=1).closed
    assert adaptive.thread_grammar(asked, depth=2, spawns=0, allowance=9).closed
    assert adaptive.thread_grammar(asked, depth=0, spawns=1, allowance=9).closed
    assert adaptive.thread_grammar(asked, depth=0, spawns=0, allowance=0).closed
    assert adaptive.thread_grammar(fixtures.settings(), depth=0, spawns=0, allowance=9) is None


def test_spelling_out_the_opening_token_opens_nothing(tokenizers):
    """With an open vocabulary a line may look like CALL_BEGIN; the spawn begins at the token."""
    tokenizer = tokenizers[1]
    before = PROMPTS[1] + generated("0,3", "4, 5", "2+3=5", 24)
    text = before + CALL_BEGIN + "No solution found.\n" + render_spawn(["0,3"])
    assert ADAPTIVE.read_spawn(text) == Malformed("malformed_spawn_line")
    asked = fixtures.settings(tokenizer=tokenizer, spawn_grammar=spawn_grammar(tokenizer, DIALECT, 16))
    call = adaptive.read_spawn(DIALECT, text, asked, depth=0, spawns=0, allowance=9)
    assert isinstance(call, SpawnCall)
    assert (call.names, call.start) == (("0,3",), text.rindex(CALL_BEGIN))


def test_the_gate_follows_the_option():
    gate = spawn_gate(small_config(**{"rollout.constrain_spawns": True, "rollout.max_children": 5}), TOKENIZER)
    assert (gate.token, gate.reserved) == (TOKENIZER.mark_id(CALL_BEGIN), (TOKENIZER.mark_id(CALL_END),))
    assert (gate.max_leaves, gate.num_choices, gate.num_words) == (10, 11, 1)
    ends = {index for index in range(TOKENIZER.vocab_size) if TOKENIZER.decode([index]).endswith("\n")}
    assert gate.follows == ends
    assert spawn_gate(small_config(), TOKENIZER) is None
