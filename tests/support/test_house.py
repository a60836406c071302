"""The house keeps its shape: who may import whom, and how long a file's parts may be."""

import ast
from pathlib import Path

import pytest

import house

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def code():
    return {name: source for name, source in house.sources(ROOT).items() if source.room != "tests"}


def beyond(found, most):
    return [f"{where}: {size}" for where, size in found if size > most]


def test_the_rooms_are_found(code):
    """Otherwise the tests below would pass on nothing."""
    assert set(house.CORE) | {"support.cli", "experiments.rlhf"} <= set(code)
    assert "support.cli" in house.imports(code["train"], code)


def test_support_never_imports_the_top_level_nor_the_core_experiments(code):
    assert house.upward(code) == []


def test_no_import_circle(code):
    assert house.circles({name: house.imports(source, code) for name, source in code.items()}) == []


def test_classes_are_short(code):
    lines = [size for source in code.values() for size in source.sizes(ast.ClassDef)]
    methods = [count for source in code.values() for count in source.methods()]
    assert beyond(lines, house.CLASS_LINES) == []
    assert beyond(methods, house.CLASS_METHODS) == []


def test_functions_are_short(code):
    found = [size for source in code.values() for size in source.sizes(house.FUNCTIONS)]
    assert beyond(found, house.FUNCTION_LINES) == []


def test_lines_are_narrow(code):
    assert [line for source in code.values() for line in source.wide()] == []


def test_imports_of_every_form_are_seen():
    """Relative ones, those in functions, packages; and which of them run when the file itself is loaded."""
    text = """
import a.b as ab
from a import c, name
from . import sibling
from ..x import y
def later():
    import d
if __name__ == "__main__":
    import e
"""
    known = ["a", "a.b", "a.c", "p.q.sibling", "p.x", "p.q.here", "d", "e"]
    source = house.Source(Path("p/q/here.py"), text.splitlines(), ast.parse(text))
    at_load = {"a.b", "a.c", "p.q.sibling", "p.x"}
    assert house.imports(source, known) == at_load | {"d", "e"}
    assert house.imports(source, known, at_load=True) == at_load
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
