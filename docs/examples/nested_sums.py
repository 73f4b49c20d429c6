"""A second task for the same engine, trainer and meter: nested sums, a child thread for each bracket.

    python docs/examples/nested_sums.py                     # SFT, GRPO, evaluations and a report in runs/nested_sums/

A problem is an expression of digits, `[[3+4]*5]-[2*8]`, whose value is wanted modulo 10. A thread hands every bracket
to a child, gets digits back, and writes one operation; children do the same one level down. So the longest chain of
tokens grows with the depth of an expression and not with its size.

    context      [[3+4]*5]-[2*8]=\\n
    completion   <Calling Sub Searches>\\n[3+4]*5=\\n2*8=\\n<End Calling Sub Searches>\\n
    join         <Sub Searches>\\n5\\n6\\n<End Sub Searches>\\n            in place of the spawn
    completion   5-6=9\\n

All that the rest of apr_jax needs to know of this is `NESTED_SUMS` at the end.
"""

import dataclasses
import functools
import pathlib
import random
import re
import sys
from collections.abc import Callable, Generator, Iterator
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from apr_jax.config import Config, TaskConfig, from_config_dict, positive
from apr_jax.engine.threads import Append, Decode, Join, Open, Spawn, StopReason, Truncate
from apr_jax.reasoning.outcome import Outcome, Settings, prompt_tokens, thread_text, token_index, truncated_reason
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import Call, Demonstration, Split, Task, TaskLacksError, Verdict
from apr_jax.tasks.countdown.trace import CALL_BEGIN, CALL_END, JOIN_BEGIN, JOIN_END

_LONGEST = 256  # characters of an expression that is read
_OPERATION = re.compile(r"^([0-9])([-+*])([0-9])=([0-9])$", re.M)
_ENDING = re.compile(r"(?:^|\n)[0-9][-+*][0-9]=([0-9])\n\Z")


@dataclasses.dataclass(frozen=True)
class Sum:
    """An operation on two operands, each a digit or a bracket."""

    left: "Sum | int"
    operator: str  # + - *
    right: "Sum | int"

    def __str__(self) -> str:
        return f"{_operand(self.left)}{self.operator}{_operand(self.right)}"

    @property
    def value(self) -> int:
        """Modulo 10."""
        left, right = _value(self.left), _value(self.right)
        return {"+": left + right, "-": left - right, "*": left * right}[self.operator] % 10

    @property
    def brackets(self) -> list["Sum"]:
        """What a thread hands to children, in order."""
        return [operand for operand in (self.left, self.right) if isinstance(operand, Sum)]


def read_sum(text: str) -> Sum | None:
    """The expression that `text` is, or None: a model may write anything."""
    return None if len(text) > _LONGEST else _read(text)


def sample(rng: random.Random, depth: int) -> Sum:
    """An expression whose brackets lie at most `depth` - 1 deep; where one may be, three operands of four are one."""
    left, right = (sample(rng, depth - 1) if depth > 1 and rng.random() < 0.75 else rng.randrange(10) for _ in range(2))
    return Sum(left, rng.choice("+-*"), right)


def solve(problem: Sum) -> Demonstration:
    """The root's calls, and then those of the threads below it."""
    return Demonstration(problem, "adaptive", tuple(_calls(problem, 0)), str(problem.value), correct=True)


def divide(problem: Sum, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Divide and conquer: the program of this task."""
    return (yield from _thread(f"{problem}=\n", settings, depth=0))


def _thread(line: str, settings: Settings, depth: int) -> Generator[Any, Any, Outcome]:
    """One expression, and the brackets in it by children."""
    tokenizer = settings.tokenizer
    counts = {"num_spawns": 0, "num_children": 0}
    failed: list[str] = []
    thread = yield Open(prompt_tokens(tokenizer, line))
    while True:
        stop = yield Decode(thread, (tokenizer.call_end_id, tokenizer.eos_id))
        text = thread_text(tokenizer, thread)
        how: dict[str, Any] = {**counts, "child_reasons": tuple(failed)}
        if stop.reason is not StopReason.TOKEN:
            return Outcome(answer=None, status="truncated", reason=truncated_reason(stop), **how)
        if stop.token == tokenizer.eos_id:
            ending = _ENDING.search(text)
            if ending is None:
                return Outcome(answer=None, status="malformed", reason="unfinished", **how)
            return Outcome(answer=ending[1], status="answered", reason="", **how)
        lines = _read_spawn(text)
        begin = token_index(tokenizer, thread, text.rfind(CALL_BEGIN))
        reason = _why_refused(lines, counts["num_spawns"], settings, depth)
        if begin is None or reason is not None:
            reason = reason or "split_token"
            return Outcome(answer=None, status="malformed", reason=reason, **how)
        handle = yield Spawn([_thread(line, settings, depth + 1) for line in lines])
        outcomes: list[Outcome] = yield Join(handle)
        counts["num_spawns"] += 1 + sum(outcome.num_spawns for outcome in outcomes)
        counts["num_children"] += len(outcomes) + sum(outcome.num_children for outcome in outcomes)
        for outcome in outcomes:
            failed += [*outcome.child_reasons, *([outcome.reason] if outcome.reason else [])]
        yield Truncate(thread, begin)
        values = "".join(f"{outcome.answer or ''}\n" for outcome in outcomes)
        yield Append(thread, tokenizer.encode(JOIN_BEGIN + values + JOIN_END))


def _read_spawn(text: str) -> list[str]:
    """The prompts that a spawn at the end of `text` asks for; none for what is no spawn."""
    begin = text.rfind("\n" + CALL_BEGIN)
    lines = text[begin + 1 + len(CALL_BEGIN) : -len(CALL_END)].splitlines(keepends=True) if begin >= 0 else []
    wanted = [line for line in lines if line.endswith("=\n") and read_sum(line[:-2]) is not None]
    return lines if lines == wanted else []


def _why_refused(lines: list[str], spawns: int, settings: Settings, depth: int) -> str | None:
    """Why a spawn is malformed, in snake_case; None where it is well-formed and within the limits."""
    if not lines:
        return "malformed_spawn"
    if depth >= settings.max_depth:
        return "too_deep"
    if spawns >= settings.max_spawns:
        return "too_many_spawns"
    return "too_many_children" if len(lines) > settings.max_children else None


def _calls(problem: Sum, depth: int) -> Iterator[Call]:
    context = f"{problem}=\n"
    if problem.brackets:
        asked = "".join(f"{bracket}=\n" for bracket in problem.brackets)
        yield _call(context, CALL_BEGIN + asked + CALL_END, depth, ends_in_spawn=True)
        context += JOIN_BEGIN + "".join(f"{bracket.value}\n" for bracket in problem.brackets) + JOIN_END
    operation = f"{_value(problem.left)}{problem.operator}{_value(problem.right)}={problem.value}\n"
    yield _call(context, operation, depth, ends_in_spawn=False)
    for bracket in problem.brackets:
        yield from _calls(bracket, depth + 1)


def _call(context: str, completion: str, depth: int, *, ends_in_spawn: bool) -> Call:
    return Call(context, completion, depth, ends_in_spawn, replay_start=len(completion))


def _operand(operand: Sum | int) -> str:
    return f"[{operand}]" if isinstance(operand, Sum) else str(operand)


def _value(operand: Sum | int) -> int:
    return operand.value if isinstance(operand, Sum) else operand


def _read(text: str) -> Sum | None:
    """Splits at the one operator outside brackets."""
    level, operators = 0, []
    for place, char in enumerate(text):
        level += (char == "[") - (char == "]")
        if level < 0:
            return None
        if level == 0 and char in "+-*":
            operators.append(place)
    if level or len(operators) != 1:
        return None
    left, right = _read_operand(text[: operators[0]]), _read_operand(text[operators[0] + 1 :])
    return None if left is None or right is None else Sum(left, text[operators[0]], right)


def _read_operand(text: str) -> Sum | int | None:
    if len(text) == 1 and text in "0123456789":
        return int(text)
    return _read(text[1:-1]) if text.startswith("[") and text.endswith("]") else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedSumsConfig(TaskConfig):
    """Nested sums' section of the configuration."""

    depth: int  # brackets lie at most so deep, and so do threads below the root

    def __post_init__(self) -> None:
        positive(self, "task", "depth")


class NestedSums(Task):
    """The value of an expression, modulo 10."""

    name = "nested_sums"
    section = NestedSumsConfig
    problem_fields = ("depth",)
    methods = ("adaptive",)
    example = "[3+4]*5"
    programs = MappingProxyType({"adaptive": divide})

    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Sum]:
        task = config.task
        assert isinstance(task, NestedSumsConfig)
        return functools.partial(sample, depth=task.depth)

    def demonstrate(self, problem: Sum, rng: random.Random, section: Any, method: str, *_: Any) -> Demonstration:
        if method != "adaptive":
            raise TaskLacksError(f"nested_sums has no demonstrations of {method}")
        return solve(problem)

    def verify(self, answer: str | None, problem: Sum) -> Verdict:
        if answer is None:
            return Verdict(False, "no_answer")
        return Verdict(True, "correct") if answer == str(problem.value) else Verdict(False, "wrong_value")

    def describe(self, problem: Sum) -> dict[str, Any]:
        return {"title": str(problem), "value": problem.value}

    def read_problem(self, value: Any) -> Sum:
        text = value["title"] if isinstance(value, dict) and "title" in value else value
        problem = text if isinstance(text, Sum) else read_sum(text) if isinstance(text, str) else None
        if problem is None:
            raise ValueError(f"{value!r} is no sum of digits and brackets")
        return problem

    def count_operations(self, text: str) -> tuple[int, int]:
        found = _OPERATION.findall(text)
        return len(found), sum(Sum(int(a), op, int(b)).value == int(c) for a, op, b, c in found)

    def child_result(self, method: str, context: str, completion: str, problem: Sum) -> str:
        asked, ending = read_sum(context.partition("=")[0]), _ENDING.search(context + completion)
        if asked is None or ending is None:
            return "unfinished"
        return "solved" if int(ending[1]) == asked.value else "wrong_value"


NESTED_SUMS = TASKS.setdefault("nested_sums", NestedSums())


def get_config() -> ConfigDict:
    """The laptop's, smaller."""
    from configs import grpo

    config = grpo.laptop()
    config.name = "nested_sums"
    config.task = dict(name="nested_sums", depth=3)
    config.model.update(num_layers=2, embed_dim=128, mlp_dim=256, num_heads=2, num_kv_heads=2, max_seq_len=64)
    config.data.update(num_workers=1, num_train=4_000, num_validation=200, num_test=500, num_test_unseen_targets=200)
    config.sft.update(num_steps=300, rows_per_step=16, row_len=128, validate_every=100)
    config.rollout.update(max_depth=2, max_children=2, max_spawns=1, max_steps=96)
    config.engine.pages = 320
    config.grpo.update(num_steps=8, row_len=128, prompts_per_step=16, rows_per_microbatch=16, checkpoint_every=4)
    config.evaluation.num_problems = 500
    return config


def main() -> None:
    from apr_jax.evaluation.run import show_summary
    from apr_jax.train.run import train

    summary = train(from_config_dict(get_config()), pathlib.Path("runs/nested_sums"))
    for stage in ("before", "after"):
        print(f"{stage} GRPO, temperature 0\n{show_summary(summary[stage])}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # where configs/ lies
    main()
