"""What a page defines for itself alone, for tests."""

import ast
import json
import linecache
import sys
from pathlib import Path
from types import ModuleType

NBS = Path(__file__).resolve().parents[1] / "nbs"
DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def _defines(node):
    """Whether a statement of a page imports, defines, or names a constant (in capitals)."""
    if isinstance(node, ast.Assign):
        targets = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
        return all(isinstance(n, ast.Tuple) or getattr(n, "id", "").isupper() for n in targets)
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
