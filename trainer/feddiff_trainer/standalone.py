"""A module of ours as one text that runs where feddiff is not installed.

What the module takes from its siblings stands before it, verbatim, with what that takes in turn; imports from elsewhere
come first. So what is exported is what was tested, and no second copy has to be kept in step.
"""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

OURS = ("feddiff_protocol", "feddiff_trainer")


def standalone(module: str) -> str:
    """The text, its docstring that of `module` itself. Names have to be distinct over all modules that it draws on."""
    root, gathered = _Module(module), _Gathered()
    for statement in root.statements:
        gathered.take_what_is_used_by(statement, root)
    gathered.finish(root, root.statements)
    docstring = ast.get_docstring(root.tree, clean=False)
    return "\n\n".join([f'"""{docstring}"""', _imports(gathered.imports), "\n\n\n".join(gathered.parts)]) + "\n"


class _Module:
    """Its statements, and where each name comes from that they use."""

    def __init__(self, name: str) -> None:
        found = find_spec(name)
        assert found is not None and found.origin is not None
        self.name, text = name, Path(found.origin).read_text()
        self.lines, self.tree = text.splitlines(), ast.parse(text)
        self.foreign: dict[str, tuple[str, str]] = {}  # by the name it has here: module, and name there or ""
        self.ours: dict[str, str] = {}
        self.statements: list[ast.stmt] = []
        for statement in self.tree.body:
            if isinstance(statement, ast.Import):
                for each in statement.names:
                    self.foreign[each.asname or each.name.partition(".")[0]] = (_as(each), "")
            elif isinstance(statement, ast.ImportFrom):
                self._note_imports(statement)
            elif not _is_text(statement):
                self.statements.append(statement)
        self.defined = {name: statement for statement in self.statements for name in _defined(statement)}

    def _note_imports(self, statement: ast.ImportFrom) -> None:
        package = self.name.rpartition(".")[0]
        home = f"{package}.{statement.module}" if statement.level else str(statement.module)
        for each in statement.names:
            if home.startswith(OURS):
                self.ours[each.name] = home
            else:
                self.foreign[each.asname or each.name] = (home, _as(each))

    def source(self, statement: ast.stmt) -> str:
        """The statement's lines, with decorators and the comment above it."""
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(each.lineno for each in decorators)]) - 1
        while self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : statement.end_lineno])


class _Gathered:
    """Statements in an order in which each finds what it uses, and the imports of all of them."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.imports: set[tuple[str, str]] = set()
        self._modules: dict[str, _Module] = {}
        self._wanted: dict[str, set[str]] = {}
        self._homes: dict[str, str] = {}

    def take_what_is_used_by(self, statement: ast.stmt, module: _Module) -> None:
        for name in _used(statement):
            if name in module.ours:
                self._take(name, module.ours[name])
            elif name in module.foreign:
                self.imports.add(module.foreign[name])
            elif name in module.defined and module.name in self._wanted:
                self._take(name, module.name)

    def _take(self, name: str, home: str) -> None:
        if home not in self._modules:
            self._modules[home], self._wanted[home] = _Module(home), set()
        if name in self._wanted[home]:
            return
        assert self._homes.setdefault(name, home) == home, f"{name} is in {home} and {self._homes[name]}"
        self._wanted[home].add(name)
        self.take_what_is_used_by(self._modules[home].defined[name], self._modules[home])

    def finish(self, root: _Module, statements: list[ast.stmt]) -> None:
        """All that was taken is in `parts`, the root's own `statements` last."""
        for home in self._in_order():
            module, wanted = self._modules[home], self._wanted[home]
            self.parts += [module.source(each) for each in module.statements if wanted & set(_defined(each))]
        self.parts += [root.source(each) for each in statements]

    def _in_order(self) -> list[str]:
        ordered: list[str] = []

        def add(home: str) -> None:
            if home in ordered:
                return
            for other in dict.fromkeys(self._modules[home].ours.values()):
                if other in self._modules:
                    add(other)
            ordered.append(home)

        for home in sorted(self._modules):
            add(home)
        return ordered


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))


def _used(statement: ast.stmt) -> list[str]:
    return sorted({each.id for each in ast.walk(statement) if isinstance(each, ast.Name)})


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _as(name: ast.alias) -> str:
    return f"{name.name} as {name.asname}" if name.asname else name.name


def _imports(needed: set[tuple[str, str]]) -> str:
    """Import statements as ruff sorts them: the standard library's first, `import x` before `from x import y`."""
    modules = {module for module, _ in needed}
    own = {each for each in modules if each.partition(".")[0] in sys.stdlib_module_names}
    return "\n\n".join("\n".join(_import_lines(group, needed)) for group in (own, modules - own) if group)


def _import_lines(modules: set[str], needed: set[tuple[str, str]]) -> list[str]:
    plain = sorted(f"import {module}" for module in modules if (module, "") in needed)
    names = {module: sorted(name for home, name in needed if home == module and name) for module in sorted(modules)}
    return plain + [f"from {module} import {', '.join(taken)}" for module, taken in names.items() if taken]
