"""Plain code, measured: tokens of a statement, comprehensions, and what the type checker ignores.

A token is a name, a number, an operator, or a word of a string. Comments, docstrings and layout do
not count. A statement is a simple statement, or the head of a compound one (`for … in …:`).
"""

import ast
import re
from pathlib import Path

import pytest

from tests.test_architecture import SOURCES, TREES, name_of

TOKENS = 13.5  # of a statement, at most, on average
LONG = 30  # tokens
SHARE_OF_LONG = 0.06
IGNORES = 20
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
COMMENT = re.compile(r"(^|\s)#.*$", re.MULTILINE)
TOKEN = re.compile(r"\w+|[^\w\s]")


def is_docstring(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def first_line(node: ast.stmt) -> int:
    """Return the line where a statement begins, with its decorators."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def source_of(node: ast.stmt, lines: list[bytes]) -> str:
    """Return the source of a simple statement, or of the head of a compound one."""
    start = first_line(node)
    last, column = node.end_lineno, node.end_col_offset
    body = getattr(node, "body", None)
    if body:
        last, column = first_line(body[0]), 0
        if last == node.lineno:  # `if a: b`
            column = body[0].col_offset
    content = lines[start - 1 : last]
    content[-1] = content[-1][:column]
    if start == node.lineno:
        content[0] = content[0][node.col_offset :]
    return b"".join(content).decode()


def tokens_of_statements(text: str) -> list[int]:
    lines = text.encode().splitlines(keepends=True)
    counts = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not is_docstring(node):
            source = COMMENT.sub("", source_of(node, lines))
            counts.append(len(TOKEN.findall(source)))
    return counts


def test_tokens_are_counted_by_hand() -> None:
    code = (
        'for a in b:  # a comment\n    """doc"""\n    c = f("two words")\n@d\ndef e(): return 1\n'
    )
    # for a in b :    c = f ( " two words " )    @ d def e ( ) :    return 1
    assert sorted(tokens_of_statements(code)) == [2, 5, 7, 9]


def test_statements_are_short() -> None:
    counts: list[int] = []
    for path in SOURCES:
        counts += tokens_of_statements(path.read_text(encoding="utf-8"))
    assert sum(counts) / len(counts) <= TOKENS
    assert sum(count > LONG for count in counts) / len(counts) <= SHARE_OF_LONG


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_comprehension_is_inside_another(path: Path) -> None:
    for outer in ast.walk(TREES[path]):
        if isinstance(outer, COMPREHENSIONS):
            inner = [node for node in ast.walk(outer) if isinstance(node, COMPREHENSIONS)]
            assert inner == [outer], f"line {outer.lineno}"


def test_the_type_checker_ignores_little_and_by_name() -> None:
    """mypy itself rejects an ignore without a code, and one that is not needed (pyproject.toml)."""
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    assert sum(text.count("# type: ignore[") for text in texts) <= IGNORES
