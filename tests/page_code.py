"""What a page defines for itself alone, for tests."""

import ast
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


def page_module(page):
    """The definitions of a page as a module; nothing that the page shows is executed."""
    notebook = json.loads((NBS / f"{page}.ipynb").read_text())
    module = ModuleType(f"page_{page}")
    sys.modules[module.__name__] = module  # dataclasses look it up
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            name = f"{page} {cell['id']}"
            linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # inspect's
            tree = ast.parse(source)
            tree.body = [node for node in tree.body if _defines(node)]
            exec(compile(tree, name, "exec"), module.__dict__)
    return module
