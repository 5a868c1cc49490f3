"""A page's code in this process: what it defines for itself alone, or all of its cells."""

import ast
import contextlib
import json
import linecache
import sys
from pathlib import Path
from types import ModuleType

NBS = Path(__file__).resolve().parents[1] / "nbs"
DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
ASSIGNS = (ast.Assign, ast.AnnAssign, ast.AugAssign)


def _defines(node):
    """Whether a statement of a page imports, defines, or names a constant (in capitals)."""
    if isinstance(node, ASSIGNS):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        return all(name.isupper() for name in names)
    return isinstance(node, DEFINES)


def _code_cells(page):
    """(file name, syntax tree, tags) of the code cells of a page, whose source `inspect` finds."""
    notebook = json.loads((NBS / f"{page}.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            name = f"{page} {cell['id']}"
            linecache.cache[name] = (len(source), None, source.splitlines(True), name)
            yield name, ast.parse(source), cell["metadata"].get("tags", [])


@contextlib.contextmanager
def _fresh_module(name):
    """A module for a page's own copies; as a kind of network the package's are registered again."""
    from deimv2_tfg.evaluation import LOADERS

    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look it up
    before = dict(LOADERS)
    try:
        yield module
    finally:
        own = [kind for kind, loader in LOADERS.items() if loader.__module__ == name]
        for kind in own:
            LOADERS[kind] = before.get(kind)
            if LOADERS[kind] is None:
                del LOADERS[kind]


def page_module(page):
    """The definitions of a page as a module; nothing that the page shows is executed."""
    with _fresh_module(f"page_{page}") as module:
        for name, tree, _ in _code_cells(page):
            tree.body = [node for node in tree.body if _defines(node)]
            exec(compile(tree, name, "exec"), module.__dict__)
    return module


def run_page(page, **parameters):
    """Execute every cell, as papermill does with these parameters; the page's names."""
    with _fresh_module(f"run_{page}") as module:
        for name, tree, tags in _code_cells(page):
            exec(compile(tree, name, "exec"), module.__dict__)
            if "parameters" in tags:
                assert parameters.keys() <= module.__dict__.keys()
                module.__dict__.update(parameters)
    return module
