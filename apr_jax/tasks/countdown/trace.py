"""The grammar of search traces: what solvers write, what models are read by (paper section 3 and its released code).

Every line ends in a newline. A thread begins with the prompt of its node; a thread that reaches the goal replays its
winning path from its own root. Model text is data: readers return `Malformed` with a short reason and never raise.
"""

import re
from collections.abc import Sequence

from apr_jax.tasks.countdown import rules
from apr_jax.tasks.countdown.rules import NUMBER, Problem
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, JOIN_BEGIN, JOIN_END, ChildResult, Ending, Malformed, SpawnCall

NO_SOLUTION = "No solution found.\n"
ROOT_ID = "0"

_NODE = rf"{NUMBER}(?:,{NUMBER})*"
_NUMBERS = rf"{NUMBER}(?:, {NUMBER})*"
_OPERATION = rf"{NUMBER}[-+*/]{NUMBER}={NUMBER}"
_OPERATIONS = rf"(?:'{_OPERATION}'(?:, '{_OPERATION}')*)?"
_STATE = rf"Current State: ({NUMBER}):\[{_NUMBERS}\], Operations: \[({_OPERATIONS})\]"
_PROMPT = re.compile(
    rf"(?:Sub Call Budget: {NUMBER} )?(?:Token Budget: {NUMBER} )?(?:Moving to Node #({_NODE})\n)?{_STATE}\n",
)
_SPAWN_LINE = re.compile(rf"<Start Sub Search ({NUMBER}) at level ({NUMBER})> Moving to Node #({_NODE})")
_GENERATED_LINE = re.compile(
    rf"^Generated Node #({_NODE}): ({NUMBER}):\[({_NUMBERS})\] Operation: ({_OPERATION})$", re.MULTILINE
)
_GOAL_LINE = re.compile(rf"^{NUMBER},{NUMBER} equal: Goal Reached$", re.MULTILINE)
_PATH = re.compile(
    rf"(?:Moving to Node #{_NODE}\nCurrent State: {NUMBER}:\[{_NUMBERS}\], Operations: \[{_OPERATIONS}\]\n"
    rf"Exploring Operation: {_OPERATION}, Resulting Numbers: \[{_NUMBERS}\]\n"
    rf"(?:Generated Node #{_NODE}: {NUMBER}:\[{_NUMBERS}\] Operation: {_OPERATION}\n)?)+"
    rf"{NUMBER},{NUMBER} equal: Goal Reached"
)


def move_line(node_id: str) -> str:
    """Return the line that turns to a node."""
    return f"Moving to Node #{node_id}\n"


def state_line(target: int, numbers: Sequence[int], operations: str) -> str:
    """Return the line of a node's state; `operations` is quoted and comma-separated: `'53-22=31', '31-26=5'`."""
    return f"Current State: {target}:{list(numbers)}, Operations: [{operations}]\n"


def generated_lines(node_id: str, target: int, numbers: list[int], operation: str) -> str:
    """Return the lines of an operation that leads to a further state."""
    return (
        f"Exploring Operation: {operation}, Resulting Numbers: {numbers}\n"
        f"Generated Node #{node_id}: {target}:{numbers} Operation: {operation}\n"
    )


def final_lines(target: int, result: int, operation: str) -> str:
    """Return the lines of an operation that leaves one number."""
    outcome = goal_line(target) if result == target else f"{result},{target} unequal: No Solution\n"
    return f"Exploring Operation: {operation}, Resulting Numbers: [{result}]\n{outcome}"


def goal_line(target: int) -> str:
    """Return the line that claims the goal."""
    return f"{target},{target} equal: Goal Reached\n"


def result_line(index: int, result: ChildResult, level: int = 1) -> str:
    """Return the line of a join that says what became of a spawn's `index`-th child, counted from 0."""
    outcome = "No Solution" if result.path is None else "Goal Reached"
    return f"<{outcome} in Sub Search {index} at level {level} at Node #{result.name}>\n"


def call_budget_text(children: int) -> str:
    """Return the beginning of a parent's prompt that names how many children it may open."""
    return f"Sub Call Budget: {children} "


def token_budget_text(tokens: int) -> str:
    """Return the beginning of a prompt that names the tokens that its thread may hold."""
    return f"Token Budget: {tokens} "


def parent_prompt(problem: Problem, budget: int | None = None, window: int | None = None) -> str:
    """Return the prompt of an adaptive thread for a whole problem.

    `budget` is the number of children that it may open, `window` the tokens that any thread of the rollout may hold.
    """
    prefix = "" if budget is None else call_budget_text(budget)
    return prefix + in_window(move_line(ROOT_ID) + state_line(problem.target, problem.numbers, ""), window)


def in_window(prompt: str, window: int | None) -> str:
    """Return a prompt that names the tokens which its thread may hold, where there is such a limit."""
    return prompt if window is None else token_budget_text(window) + prompt


def serial_prompt(problem: Problem, budget: int | None = None) -> str:
    """Return the prompt of a serial search; `budget` is the number of tokens it may take."""
    prefix = "" if budget is None else token_budget_text(budget)
    return prefix + state_line(problem.target, problem.numbers, "")


def render_spawn(node_ids: Sequence[str], level: int = 1) -> str:
    """Return the text of a spawn of these nodes, CALL_BEGIN to CALL_END."""
    return "".join([CALL_BEGIN, *(spawn_line(i, level, node_id) for i, node_id in enumerate(node_ids)), CALL_END])


def spawn_line(index: int, level: int, node_id: str) -> str:
    """Return the line of a spawn that asks for its `index`-th child, counted from 0."""
    return f"<Start Sub Search {index} at level {level}> {move_line(node_id)}"


def render_join(results: Sequence[ChildResult], level: int = 1) -> str:
    """Return the text that replaces a spawn: the children's results in spawn order, JOIN_BEGIN to JOIN_END."""
    lines = [JOIN_BEGIN]
    for index, result in enumerate(results):
        lines.append(result_line(index, result, level))
        if result.path is not None:
            lines.append(f"{result.path}\n")
    lines.append(JOIN_END)
    return "".join(lines)


def thread_node(text: str) -> str | None:
    """Return the node that a thread's prompt, at the start of its text, turns to; None without a prompt."""
    prompt = _PROMPT.match(text)
    return None if prompt is None else prompt[1] or ROOT_ID


def spawnable_nodes(text: str) -> list[str]:
    """Return the nodes that a spawn may name which begins at the end of a thread's text, the prompt included.

    They come in the order in which they were first generated. None where the prompt is unknown.
    """
    prompt = _PROMPT.match(text)
    if prompt is None:
        return []
    generated = _generated_nodes(text, prompt.end(), len(text))
    known = (prompt[1] or ROOT_ID, prompt[3], prompt[2], generated)
    return [node_id for node_id in generated if isinstance(_child_prompt(node_id, *known), str)]


def parse_spawn(text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
    """Read the spawn that ends a thread's text (prompt and everything after; ends in CALL_END).

    It begins at the first CALL_BEGIN line, or with `last_begin` at the last.

    A child's prompt is built from the line that generated its node and from the operations on the way there: those of
    the thread's own prompt, then those of the generated nodes. Reasons: no_call_end, no_call_begin, unknown_prompt,
    empty_spawn, malformed_spawn_line, wrong_index, wrong_level, duplicate_node, unknown_node, ambiguous_node (generated
    twice, differently), wrong_target, final_node (a single number is left).
    """
    if not text.endswith(CALL_END):
        return Malformed("no_call_end")
    start = (text.rfind if last_begin else text.find)("\n" + CALL_BEGIN) + 1
    if start == 0:
        return Malformed("no_call_begin")
    prompt = _PROMPT.match(text)
    if prompt is None or prompt.end() > start:
        return Malformed("unknown_prompt")
    requested = _read_spawn_lines(text[start + len(CALL_BEGIN) : -len(CALL_END)])
    if isinstance(requested, Malformed):
        return requested
    node_ids, level = requested
    root_id, target, root_operations = prompt[1] or ROOT_ID, prompt[2], prompt[3]
    generated = _generated_nodes(text, prompt.end(), start)
    contexts = []
    for node_id in node_ids:
        context = _child_prompt(node_id, root_id, root_operations, target, generated)
        if isinstance(context, Malformed):
            return context
        contexts.append(context)
    return SpawnCall(start, tuple(contexts), node_ids, level)


def read_answer(text: str) -> str | None:
    """Return the winning path of a finished thread: what follows the second-to-last goal line, without outer blanks.

    None if the text does not end by claiming the goal (`Exit Sub Search` lines aside), or if nothing was replayed.
    """
    if not rules.claims_goal(text):
        return None
    ends = [match.end() for match in _GOAL_LINE.finditer(text)]
    return text[ends[-2] :].strip() if len(ends) > 1 else None


def read_ending(text: str) -> Ending:
    """Read the claim of a root thread that ended by itself.

    A thread that ends neither in a goal nor in "No solution found." is malformed ("unfinished"), and so is one that
    claims the goal but replays no path ("no_replay").
    """
    answer = read_answer(text)
    if answer is not None:
        return Ending(answer, "answered", "")
    if text.endswith("\n" + NO_SOLUTION):
        return Ending(None, "no_solution", "no_solution")
    return Ending(None, "malformed", "no_replay" if rules.claims_goal(text) else "unfinished")


def read_path(text: str) -> str | None:
    """Return all text of a thread that writes nothing but its path; None if it does not end by claiming the goal."""
    return text.strip() if rules.claims_goal(text) else None


def read_child_result(text: str, node_id: str) -> ChildResult | Malformed:
    """Read what a finished child (prompt and everything after) hands to its parent.

    Reasons: unfinished (ends neither in a goal nor in "No solution found."), no_replay (claims the goal only once),
    malformed_path (the replay is not a path of moves and operations), wrong_root (the replay starts at another node).
    """
    if text.endswith("\n" + NO_SOLUTION):
        return ChildResult(node_id, None)
    if not rules.claims_goal(text):
        return Malformed("unfinished")
    path = read_answer(text)
    if path is None:
        return Malformed("no_replay")
    if _PATH.fullmatch(path) is None:
        return Malformed("malformed_path")
    if not path.startswith(move_line(node_id)):
        return Malformed("wrong_root")
    return ChildResult(node_id, path)


def _read_spawn_lines(body: str) -> tuple[tuple[str, ...], int] | Malformed:
    """Read the nodes and the level that a spawn's lines, without CALL_BEGIN and CALL_END, ask for."""
    if not body:
        return Malformed("empty_spawn")
    *lines, unfinished = body.split("\n")
    if unfinished:
        return Malformed("malformed_spawn_line")
    node_ids: list[str] = []
    levels = set()
    for index, line in enumerate(lines):
        match = _SPAWN_LINE.fullmatch(line)
        if match is None:
            return Malformed("malformed_spawn_line")
        if int(match[1]) != index:
            return Malformed("wrong_index")
        levels.add(int(match[2]))
        if match[3] in node_ids:
            return Malformed("duplicate_node")
        node_ids.append(match[3])
    level = levels.pop()
    return Malformed("wrong_level") if levels or level < 1 else (tuple(node_ids), level)


def _generated_nodes(text: str, start: int, end: int) -> dict[str, set[tuple[str, str, str]]]:
    """Return by node each different target, numbers and operation that is written for it between two offsets."""
    generated: dict[str, set[tuple[str, str, str]]] = {}
    for node_id, *node in _GENERATED_LINE.findall(text, start, end):
        generated.setdefault(node_id, set()).add((node[0], node[1], node[2]))
    return generated


def _child_prompt(
    node_id: str, root_id: str, root_operations: str, target: str, generated: dict[str, set[tuple[str, str, str]]]
) -> str | Malformed:
    operations: list[str] = []
    ancestor_id = node_id
    numbers = ""
    while ancestor_id != root_id:
        nodes = generated.get(ancestor_id, set())
        if len(nodes) != 1:
            return Malformed("ambiguous_node" if nodes else "unknown_node")
        ((node_target, node_numbers, operation),) = nodes
        if node_target != target:
            return Malformed("wrong_target")
        numbers = numbers or node_numbers
        operations.insert(0, f"'{operation}'")
        ancestor_id = ancestor_id.rpartition(",")[0]
    if not numbers:
        return Malformed("unknown_node")
    if "," not in numbers:
        return Malformed("final_node")
    all_operations = ", ".join([*filter(None, [root_operations]), *operations])
    return f"{move_line(node_id)}Current State: {target}:[{numbers}], Operations: [{all_operations}]\n"
