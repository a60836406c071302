"""The structure of this checkout in figures, as `make house` prints it.

    python tests/house.py [DIR]        DIR: another checkout

Rooms: core (the eight files at the top that a newcomer reads, in this order), support (which never imports
the top level), experiments (which may import anything), tests. The figures are of the source without tests.
"""

import ast
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CORE = ["losses", "forest", "model", "data", "sample", "judge", "recipes", "train"]
COLUMNS, FUNCTION_LINES, CLASS_LINES, CLASS_METHODS = 110, 45, 300, 22
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Source:
    """One file, read and parsed once."""

    path: Path  # from the root of the checkout
    lines: list[str]
    tree: ast.Module

    @property
    def module(self):
        """Its name in an import: support.cli; of a package's __init__.py, the package's."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self):
        if len(self.path.parts) > 1:
            return self.path.parts[0]
        return "core" if self.module in CORE else "top, not core"

    def wide(self):
        """[(where, columns)] of the lines that are too wide."""
        numbered = enumerate(self.lines, start=1)
        return [(f"{self.path}:{i}", len(line)) for i, line in numbered if len(line) > COLUMNS]

    def sizes(self, kinds):
        """[(where, lines)] of its definitions of these kinds, with docstring and signature."""
        return [
            (f"{self.path}:{node.name}", node.end_lineno - node.lineno + 1)
            for node in ast.walk(self.tree)
            if isinstance(node, kinds)
        ]

    def methods(self):
        """[(where, methods)] of its classes."""
        return [
            (f"{self.path}:{node.name}", sum(isinstance(child, FUNCTIONS) for child in node.body))
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ClassDef)
        ]


def sources(root):
    """{module: Source} of a checkout, without what lies in hidden folders."""
    root = Path(root).resolve()
    found = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not any(part.startswith(".") for part in inside.parts):
            text = path.read_text(encoding="utf-8")
            source = Source(inside, text.splitlines(), ast.parse(text, str(path)))
            found[source.module] = source
    return found


# ------------------------------------------------------------------------------------------------------------
# Imports


def imports(source, known, at_load=False):
    """The modules among `known` that it imports: anywhere, or only as it is loaded itself."""
    package = source.module.split(".")[: None if source.path.name == "__init__.py" else -1]
    named, nodes = set(), list(source.tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            inside = {f"{start}.{alias.name}" for alias in node.names} & set(known)
            named |= inside or {start}  # from support import cli: that file, not its package
        elif not (at_load and (isinstance(node, FUNCTIONS) or is_main(node))):
            nodes += ast.iter_child_nodes(node)
    return named & set(known) - {source.module}


def is_main(node):
    """Whether it is `if __name__ == "__main__":`, which no import runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def circles(arrows):
    """The modules that reach themselves; arrows: {module: modules that it imports}."""

    def reached(start):
        seen, waiting = set(), list(arrows[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += arrows[module]
        return seen

    return sorted(module for module in arrows if module in reached(module))


def upward(code):
    """The arrows that no file may have: "support.cli -> model" anywhere in it, "train -> experiments.toy"
    where loading the file follows it.
    """
    found = []
    for name, source in code.items():
        if source.room == "support":
            found += [(name, other) for other in imports(source, code) if code[other].room != "support"]
        elif source.room == "core":
            loaded = imports(source, code, at_load=True)
            found += [(name, other) for other in loaded if code[other].room == "experiments"]
    return [f"{name} -> {other}" for name, other in sorted(found)]


# ------------------------------------------------------------------------------------------------------------


def figures(root):
    """{what: figure} of a checkout, in the order of printing; the largest of each kind is (where, size)."""
    files = sources(root)
    code = {name: source for name, source in files.items() if source.room != "tests"}
    arrows = {name: imports(source, code) for name, source in code.items()}
    rooms, wide = Counter(), Counter()
    for source in files.values():
        rooms[source.room] += len(source.lines)
        wide["tests" if source.room == "tests" else "source"] += len(source.wide())

    def largest(sizes):
        return max((size for source in code.values() for size in sizes(source)), key=lambda size: size[1])

    return {
        "lines by room": dict(rooms),
        "source in all": rooms.total() - rooms["tests"],
        "largest file": largest(lambda source: [(str(source.path), len(source.lines))]),
        "largest class": largest(lambda source: source.sizes(ast.ClassDef)),
        "most methods in a class": largest(Source.methods),
        "longest function": largest(lambda source: source.sizes(FUNCTIONS)),
        f"lines over {COLUMNS} columns": wide["source"],
        f"lines over {COLUMNS} columns in tests": wide["tests"],
        "import arrows": sum(map(len, arrows.values())),
        "modules in import circles": circles(arrows),
        "upward imports": upward(code),
    }


def main():
    for name, figure in figures(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).items():
        if isinstance(figure, tuple):
            figure = f"{figure[1]}  {figure[0]}"
        elif isinstance(figure, dict):
            figure = "  ".join(f"{room} {lines:,}" for room, lines in sorted(figure.items()))
        elif isinstance(figure, list):
            figure = "  ".join([str(len(figure)), ", ".join(figure)]).rstrip()
        print(f"{name:32} {figure:,}" if isinstance(figure, int) else f"{name:32} {figure}")


if __name__ == "__main__":
    main()
