"""Docstrings begin as they should: a function's with an imperative verb, a class's with a noun, none with a question.

A verb that is missing from tests/verbs.txt is added there. A docstring that begins otherwise is rewritten.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("apr_jax", "launch", "configs")
VERBS = frozenset((ROOT / "tests" / "verbs.txt").read_text().split())
# Nouns that are verbs too.
NOUNS = frozenset({"cache", "call", "count", "cut", "group", "index", "limit", "list", "mask", "place", "plan"})
NOUNS |= {"record", "row", "run", "setting", "state", "step", "test", "trace"}
# Words that begin an indirect question, a fragment or a sentence without a subject of its own.
QUESTIONS = frozenset(
    {"also", "and", "as", "at", "both", "by", "for", "how", "if", "in", "its", "of", "on", "that", "what", "when"}
    | {"where", "whether", "which", "who", "whom", "whose", "why", "with"}
)
PRODUCT_TEXT = re.compile(r"\b(RECIPE|INTERFACES|DESIGN\.md|STYLE\.md|TODO|FIXME)\b")


def _files() -> list[pathlib.Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, node.body[0].lineno, text


def _is_property(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(ast.unparse(decorator).rpartition(".")[2] in ("property", "cached_property") for decorator in decorators)


def _is_verb(word: str) -> bool:
    """Return True for an imperative or a third person: read, reads, fetches, carries."""
    return bool(
        {word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"} & (VERBS - NOUNS)
    )


def _fault(node: ast.AST, text: str) -> str | None:
    """Return what is wrong with a docstring's first word, or None."""
    word = re.split(r"[\s,.:;]", text, maxsplit=1)[0].lower()
    if word in QUESTIONS:
        return "begins with an indirect question or a fragment"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node) and word not in VERBS:
        return "a function's begins with an imperative verb (tests/verbs.txt lists them)"
    if isinstance(node, ast.ClassDef) and _is_verb(word):
        return "a class's begins with a noun"
    return None


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_as_they_should(path: pathlib.Path):
    name = str(path.relative_to(ROOT))
    found = [
        f"{name}:{line}: {fault}: {text.splitlines()[0]}"
        for node, line, text in _docstrings(ast.parse(path.read_text()))
        if (fault := _fault(node, text))
    ]
    assert not found, "\n" + "\n".join(found)


def test_the_product_speaks_of_itself_alone():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if PRODUCT_TEXT.search(line)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "is_right"),
    [
        ("def f():\n '''Return one.'''", True),
        ("def f():\n '''Returns one.'''", False),
        ("def f():\n '''The one.'''", False),
        ("def f():\n '''Whether it is one.'''", False),
        ("class A:\n @property\n def f(self):\n  '''The one.'''", True),
        ("class A:\n @property\n def f(self):\n  '''Whether it is one.'''", False),
        ("class A:\n '''One host of a job.'''", True),
        ("class A:\n '''Fetches a host.'''", False),
        ("class A:\n '''Which host.'''", False),
        ("'''What hosts do.'''", False),
    ],
)
def test_the_rule_itself(code: str, is_right: bool):
    faults = [_fault(node, text) for node, _, text in _docstrings(ast.parse(code))]
    assert (faults == [None]) == is_right
