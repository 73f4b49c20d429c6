"""The phrases of Countdown's traces, which the built-in tokenizer has as one token each, in the order of their ids."""

from apr_jax.tasks.countdown.pasta import SYNC
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, JOIN_BEGIN, JOIN_END, VALUES

LARGEST_CHILD = 9  # a step of a node id, ",9", is one token up to this one; targets, which follow a comma too, are not

# The trace grammar's fixed phrases. Lists and operations keep distinct last tokens: "], Operations: []\n" ends a state
# without operations, "']\n" one with, "\n" a Generated Node line.
PHRASES = (
    "Moving to Node #0",
    "Current State: ",
    ":[",
    ", ",
    "], Operations: []\n",
    "], Operations: ['",
    "', '",
    "']\n",
    "Exploring Operation: ",
    ", Resulting Numbers: [",
    "]\n",
    "Generated Node #0",
    ": ",
    "] Operation: ",
    " unequal: No Solution\n",
    " equal: Goal Reached\n",
    "No solution found.\n",
    CALL_BEGIN,
    CALL_END,
    JOIN_BEGIN,
    JOIN_END,
    "<Start Sub Search ",
    "<No Solution in Sub Search ",
    "<Goal Reached in Sub Search ",
    " at level 1> Moving to Node #0",
    " at level 1 at Node #0",
    " at level ",
    "> Moving to Node #0",
    " at Node #0",
    ">\n",
    "Sub Call Budget: ",
    "Token Budget: ",
    "Start Sub Search at level ",
    ": Moving to Node #0",
    "Exit Sub Search at level ",
    "No solution found in sub search\n",
    *(f",{child}" for child in range(LARGEST_CHILD + 1)),
)
# Phrases of other methods. Their ids come after all numbers, so that those above never change.
LATER_PHRASES = (*(f"{verdict}\n" for verdict in VALUES), SYNC)
