"""Spawns that are well-formed by construction: the grammar of `trace.parse_spawn` as automata over tokens.

A spawn begins at the start of a line, where the thread's text has at least one node that it may name, and where depth,
number of spawns and the rollout's number of children allow one. What follows is one line a child: indices from 0, the
level of the thread's children, distinct nodes of those that may be named, in any order, as many lines at most as
`max_children` and what is left of the rollout's children; then CALL_END. Lines are spelt as the tokenizer encodes them,
in no other way.

Of a thread with very many nodes the latest that fit the automaton's fixed size may be named (`Gate.max_leaves`, twice
`max_children`, and `Gate.max_edges`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.constraints import START, Automaton, Edge, Gate
from apr_jax.tasks.countdown import trace

Lines = tuple[tuple[int, ...], ...]
_Residual = tuple[tuple[int, tuple[int, ...]], ...]  # (leaf, tokens still to come) of each line that is possible

_CACHED_NODES = 1 << 14


class SpawnGrammar:
    """What all threads share: how a tokenizer spells spawns of at most `max_children` lines."""

    def __init__(self, tokenizer: Tokenizer, max_children: int) -> None:
        self.tokenizer, self.max_children = tokenizer, max_children
        texts = tokenizer.token_texts  # of one id at a time: as it stands at the start of a line
        self.gate = Gate(
            token=tokenizer.call_begin_id,
            reserved=(tokenizer.call_end_id,),
            follows=frozenset(index for index in range(tokenizer.vocab_size) if texts([index])[0].endswith("\n")),
            max_edges=24 * max_children + 64,
            max_leaves=2 * max_children,
        )
        self._lines = functools.lru_cache(_CACHED_NODES)(self._encode_lines)
        self._fits = functools.lru_cache(_CACHED_NODES)(self._fits_alone)

    def nodes(self, text: str, level: int) -> list[str]:
        """The nodes that a spawn after `text` may name."""
        return [node_id for node_id in trace.spawnable_nodes(text) if self._fits(level, node_id)]

    def automaton(self, nodes: Sequence[str], level: int, most: int) -> Automaton:
        """Of the text after CALL_BEGIN, CALL_END included, with at most `most` lines, 1 to `max_children`.

        `nodes` are of `nodes`, and not none.
        """
        latest = nodes[-self.gate.max_leaves :]
        edges = self._edges(latest, level, most)
        while len(edges) > self.gate.max_edges:
            latest = latest[1:]
            edges = self._edges(latest, level, most)
        return Automaton(self.gate, edges)

    def _edges(self, nodes: Sequence[str], level: int, most: int) -> list[Edge]:
        """The edges that spell every line, in states that are as few as can be: equal futures are one state."""
        edges = [Edge(START, self.tokenizer.call_end_id, target=0, low=1)]
        states: dict[_Residual, int] = {}
        lines = [self._lines(level, node_id) for node_id in nodes]
        for index in range(most):
            residual = tuple((leaf, of_node[index]) for leaf, of_node in enumerate(lines))
            _add_edges(edges, states, START, residual, index)
        return edges

    def _encode_lines(self, level: int, node_id: str) -> Lines:
        """A node's line for every index."""
        return tuple(
            tuple(self.tokenizer.encode(trace.spawn_line(index, level, node_id))) for index in range(self.max_children)
        )

    def _fits_alone(self, level: int, node_id: str) -> bool:
        return len(self._edges([node_id], level, self.max_children)) <= self.gate.max_edges


def _add_edges(
    edges: list[Edge], states: dict[_Residual, int], source: int, residual: _Residual, index: int | None
) -> None:
    """Adds the edges that leave `source`, where `residual` is still to come, and those of all states behind it.

    Args:
        index: of the line, where `source` is START: its edges are for that count alone.
    """
    following: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for leaf, (token, *rest) in residual:
        following.setdefault(token, []).append((leaf, tuple(rest)))
    for token, after in following.items():
        leaves = sum(1 << leaf for leaf, _ in after)
        left = tuple(after)
        known = not left[0][1] or left in states
        target = START if not left[0][1] else states.setdefault(left, START + 1 + len(states))
        counts = {} if index is None else {"low": index, "high": index}
        edges.append(Edge(source, token, target, leaves=leaves, **counts))
        if not known:
            _add_edges(edges, states, target, left, None)


class ThreadGrammar:
    """The spawns of one thread, until its next: a `constraints.Grammar`."""

    def __init__(self, grammar: SpawnGrammar, level: int, most: int) -> None:
        """`level` is that of the thread's children, and `most` how many it may open; 0: it cannot spawn."""
        self.closed = most < 1
        self._grammar, self._level, self._most = grammar, level, most
        self._text, self._num_tokens = "", 0
        self._nodes: list[str] = []

    def is_open(self, tokens: Sequence[int]) -> bool:
        # Asked at line starts only, where text adds up; nodes change only with a line that generates one.
        added = self._grammar.tokenizer.decode(tokens[self._num_tokens :])
        self._text, self._num_tokens = self._text + added, len(tokens)
        if "Generated Node" in added:
            self._nodes = self._grammar.nodes(self._text, self._level)
        return bool(self._nodes)

    def automaton(self, tokens: Sequence[int]) -> Automaton:
        assert len(tokens) == self._num_tokens + 1, "the gate opened at the token before"
        return self._grammar.automaton(self._nodes, self._level, self._most)


_GRAMMARS: Callable[[Any, int], SpawnGrammar] = functools.lru_cache(4)(SpawnGrammar)


def spawn_grammar(tokenizer: Tokenizer, max_children: int) -> SpawnGrammar:
    """The grammar of a tokenizer, made once."""
    return _GRAMMARS(tokenizer, max_children)
