"""Spawns that are well-formed by construction: a dialect's grammar of spawns as automata over tokens.

A spawn begins at the start of a line, where the thread's text has at least one name that it may ask for, and where
depth, number of spawns and the rollout's number of children allow one. What follows is one line a child: indices from
0, the level of the thread's children, distinct names of those that may be asked for, in any order, as many lines at
most as `max_children` and what is left of the rollout's children; then the mark that ends it. Lines are spelt as the
tokenizer encodes them, in no other way.

Of very many names the latest that fit the automaton's fixed size may be asked for (`Gate.max_leaves`, twice
`max_children`, and `Gate.max_edges`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from apr_jax.config import ConfigError
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.constraints import START, Automaton, Edge, Gate
from apr_jax.tasks.dialect import SpelledSpawnDialect

Lines = tuple[tuple[int, ...], ...]
_Residual = tuple[tuple[int, tuple[int, ...]], ...]  # (leaf, tokens still to come) of each line that is possible

_CACHED_NAMES = 1 << 14


class SpawnGrammar:
    """The part that all threads share: how a tokenizer spells a dialect's spawns of at most `max_children` lines.

    Raises ConfigError for a tokenizer without a token for the begin or the end of a spawn.
    """

    def __init__(self, tokenizer: Tokenizer, dialect: SpelledSpawnDialect, max_children: int) -> None:
        self.tokenizer, self.dialect, self.max_children = tokenizer, dialect, max_children
        ids = {mark: tokenizer.mark_id(mark) for mark in (dialect.spawn_begin, dialect.spawn_end)}
        for mark in (mark for mark, index in ids.items() if index is None):
            raise ConfigError(
                f"rollout.constrain_spawns needs {mark!r} as one token, which the tokenizer spells in several: set "
                "data.add_marker_tokens, and train the policy with it"
            )
        begin_id, self._end_id = (index for index in ids.values() if index is not None)
        texts = tokenizer.token_texts  # of one id at a time: as it stands at the start of a line
        self.gate = Gate(
            token=begin_id,
            reserved=(self._end_id,),
            follows=frozenset(index for index in range(tokenizer.vocab_size) if texts([index])[0].endswith("\n")),
            max_edges=24 * max_children + 64,
            max_leaves=2 * max_children,
        )
        self._lines = functools.lru_cache(_CACHED_NAMES)(self._encode_lines)
        self._fits = functools.lru_cache(_CACHED_NAMES)(self._fits_alone)

    def names(self, text: str, level: int) -> list[str]:
        """Return the names that a spawn after `text` may ask for."""
        return [name for name in self.dialect.spawnable(text) if self._fits(level, name)]

    def automaton(self, names: Sequence[str], level: int, most: int) -> Automaton:
        """Return the automaton of the text after the begin mark, with 1 to `most` lines and the end mark.

        `names` are of `names`, and not none.
        """
        latest = names[-self.gate.max_leaves :]
        edges = self._edges(latest, level, most)
        while len(edges) > self.gate.max_edges:
            latest = latest[1:]
            edges = self._edges(latest, level, most)
        return Automaton(self.gate, edges)

    def _edges(self, names: Sequence[str], level: int, most: int) -> list[Edge]:
        """Return the edges that spell every line, in as few states as can be: equal futures are one state."""
        edges = [Edge(START, self._end_id, target=0, low=1)]
        states: dict[_Residual, int] = {}
        lines = [self._lines(level, name) for name in names]
        for index in range(most):
            residual = tuple((leaf, of_name[index]) for leaf, of_name in enumerate(lines))
            _add_edges(edges, states, START, residual, index)
        return edges

    def _encode_lines(self, level: int, name: str) -> Lines:
        """Return a name's line for every index."""
        return tuple(
            tuple(self.tokenizer.encode(self.dialect.spawn_line(index, level, name)))
            for index in range(self.max_children)
        )

    def _fits_alone(self, level: int, name: str) -> bool:
        return len(self._edges([name], level, self.max_children)) <= self.gate.max_edges


def _add_edges(
    edges: list[Edge], states: dict[_Residual, int], source: int, residual: _Residual, index: int | None
) -> None:
    """Add the edges that leave `source`, where `residual` is still to come, and those of all states behind it.

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
        """Hold a thread to spawns at its children's `level` of at most `most` children; 0: it cannot spawn."""
        self.closed = most < 1
        self._grammar, self._level, self._most = grammar, level, most
        self._text, self._num_tokens = "", 0
        self._names: list[str] = []

    def is_open(self, tokens: Sequence[int]) -> bool:
        # Asked at line starts only, where text adds up; names change only with a line that adds one.
        added = self._grammar.tokenizer.decode(tokens[self._num_tokens :])
        self._text, self._num_tokens = self._text + added, len(tokens)
        if self._grammar.dialect.may_name_more(added):
            self._names = self._grammar.names(self._text, self._level)
        return bool(self._names)

    def automaton(self, tokens: Sequence[int]) -> Automaton:
        assert len(tokens) == self._num_tokens + 1, "the gate opened at the token before"
        return self._grammar.automaton(self._names, self._level, self._most)


_GRAMMARS: Callable[[Any, Any, int], SpawnGrammar] = functools.lru_cache(4)(SpawnGrammar)


def spawn_grammar(tokenizer: Tokenizer, dialect: SpelledSpawnDialect, max_children: int) -> SpawnGrammar:
    """Return the grammar of a tokenizer and a dialect, made once."""
    return _GRAMMARS(tokenizer, dialect, max_children)
