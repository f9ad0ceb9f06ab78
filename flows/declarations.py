"""`python -m flows.declarations`: does `dvc.yaml` declare what the code of each stage reads?

A stage must rerun when its code or its params change, and no more often: the shared modules it declares are exactly
those its room imports, directly or through others, and its params are exactly the sections its code reads. What only
watches a stage (`stages/core/observe`) changes no result and is left out.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from flows.graph import Stage, read_graph
from stages.core.errors import UserError
from stages.core.params import Params

SHARED = "stages.core"
WATCHING = "stages.core.observe"
README = Path("README.md")

_CONTRACT = Path("stages/core/stage.py")
_IN_TEMPLATE = re.compile(r"\bparams\.(\w+)")
_SECTIONS = set(Params.model_fields)
_ALWAYS = {"seed"}  # the stage contract seeds every stage, whether its code draws a number or not
_NEVER = {"saves", "tracking"}  # what is kept and told on the way changes no result; `register` alone is about telling


def declaration_problems() -> list[str]:
    """Compare every stage's declaration with its code; return a line for each difference.

    Raises:
        UserError: if the graph cannot be read.
    """
    return [line for stage in read_graph().stages if not stage.always for line in _problems_of(stage)]


def shared_code(module: str) -> set[str]:
    """Files of `stages/core` that a room or module imports, directly or through others; watching code left out."""
    found: set[str] = set()
    waiting = [name for path in _files_of(module) for name in _imports(path)]
    while waiting:
        name = waiting.pop()
        path = Path(*name.split(".")).with_suffix(".py")
        if not name.startswith(f"{SHARED}.") or name.startswith(WATCHING) or str(path) in found:
            continue
        found.add(str(path))
        waiting.extend(_imports(path))
    return found


def sections_read(module: str) -> set[str]:
    """Sections of the params that a room reads, as `params.SECTION`, in its code, its templates and the shared code."""
    shared = {Path(path) for path in shared_code(module)} - {_CONTRACT}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in [*_files_of(module), *sorted(shared)]]
    in_code = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in _SECTIONS and _is_params(node.value)
    }
    templates = [path.read_text(encoding="utf-8") for path in sorted(_folder_of(module).rglob("*.html"))]
    return in_code | {name for text in templates for name in _IN_TEMPLATE.findall(text) if name in _SECTIONS}


def module_of(stage: Stage) -> str:
    """The module that a stage's command runs: `stages.prune` of `python -m stages.prune --out ...`."""
    words = shlex.split(stage.command)
    return words[words.index("-m") + 1]


def table_in_readme() -> str:
    """The stage table as the README has it, between its markers."""
    text = README.read_text(encoding="utf-8")
    return text.partition("<!-- stages -->\n")[2].partition("\n<!-- /stages -->")[0]


def _problems_of(stage: Stage) -> Iterator[str]:
    module = module_of(stage)
    declared = {path for path in stage.dependencies if path.startswith("stages/core")}
    needed = shared_code(module) if module.startswith("stages.") else set()  # what registers a model makes no model
    room = module.replace(".", "/")
    if not {room, f"{room}.py"} & set(stage.dependencies):
        yield f"{stage.name}: add the dependency {room if Path(room).is_dir() else f'{room}.py'}"
    yield from (f"{stage.name}: add the dependency {path}" for path in sorted(needed - declared))
    yield from (f"{stage.name}: remove the dependency {path}" for path in sorted(declared - needed))
    read, params = sections_read(module), set(stage.params)
    yield from (f"{stage.name}: add the params section {name}" for name in sorted(read - params - _ALWAYS - _NEVER))
    yield from (f"{stage.name}: remove the params section {name}" for name in sorted(params - read - _ALWAYS - _NEVER))


def _folder_of(module: str) -> Path:
    return Path(*module.split("."))


def _files_of(module: str) -> list[Path]:
    folder = _folder_of(module)
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def _imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, wherever in it, but for those that only the type checker sees."""
    for node in _without_type_checking(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name for name in modules if Path(*name.split(".")).with_suffix(".py").exists())
            yield node.module


def _without_type_checking(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _without_type_checking(child)


def _is_params(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "params") or (
        isinstance(node, ast.Attribute) and node.attr == "params"
    )


def main() -> int:
    """Print what to change; return 1 if there is anything."""
    try:
        problems = declaration_problems()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(problems) or "dvc.yaml declares what the code reads")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
