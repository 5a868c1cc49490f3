"""The pages against the rules of the house: what a reader, a test run and a headless run rely on."""

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in PAGES if p.name[0].isdigit()]
ORDER = [
    "core",
    "synthetic",
    "photographs",
    "statistics",
    "data",
    "formats",
    "transforms",
    "doctor",
    "splits",
    "backbone",
    "detector",
    "criterion",
    "evaluation",
    "decisions",
    "cost",
    "input_size",
    "training",
    "stability",
    "text",
    "fusion",
    "multimodal",
    "baselines",
    "results",
    "errors",
    "deployment",
    "thesis",
    "browse",
    "cli",
    "pretraining",
]


def cells(path, kind="code"):
    return [
        c | {"source": "".join(c["source"])}
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == kind
    ]


def exported(path):
    return [c["source"] for c in cells(path) if re.search(r"^#\|\s*export", c["source"], re.M)]


def lines(source):
    return sum(1 for l in source.splitlines() if l.strip() and not l.lstrip().startswith("#|"))


ids = lambda paths: [p.stem for p in paths]


def test_every_chapter_of_the_table_is_there():
    names = "00_core 01_data 00e_synthetic 01b_formats 01c_transforms 02_backbone 03_detector 03a_criterion 03b_evaluation 04_training_stability 05_multimodal 06_baselines 07_results".split()
    assert set(names) | {"index"} <= set(ids(PAGES))


def test_exported_cells_are_small():
    sizes = sorted(lines(s) for p in PAGES for s in exported(p))
    assert statistics.median(sizes) <= 10 and sizes[-1] <= 60


@pytest.mark.parametrize("page", CHAPTERS, ids=ids(CHAPTERS))
def test_opening(page):
    first = cells(page)[:4]
    assert first[0]["source"].startswith("#| default_exp")
    tagged = [c for c in cells(page) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["source"] == first[1]["source"]
    assigned = {t.id: n.value for n in ast.parse(tagged[0]["source"]).body for t in n.targets}
    assert {"profile", "data_dir", "study", "seed"} <= assigned.keys() and all(
        isinstance(v, ast.Constant) for v in assigned.values()
    )
    title = cells(page, "markdown")[0]["source"]
    assert re.match(r"# \d+[a-z]?\. \S.*\n\n> \S", title) and len(title.split()) > 60


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_no_path_star_import_or_muted_warning(page):
    for c in cells(page):
        s = c["source"]
        assert not re.search(
            r"(?<![\w./:])/(?:home|root|work|tmp|Users|mnt|content|kaggle)/[\w.-]+", s
        ), s
        assert "sys.path" not in s and not re.search(r"^\s*from\s+\S+\s+import\s+\*", s, re.M)
        assert not re.search(r"filterwarnings\(\s*['\"]ignore['\"]\s*\)", s)


@pytest.mark.parametrize("page", CHAPTERS, ids=ids(CHAPTERS))
def test_every_definition_runs_nearby(page):
    code, missing = cells(page), []
    for i, c in enumerate(code):
        if c["source"] not in exported(page):
            continue
        names = [
            n.name
            for n in ast.parse(c["source"]).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        ]
        near = [
            d["source"]
            for d in code[i + 1 : i + 4]
            if "#| export" not in d["source"] and "#| hide" not in d["source"]
        ]
        if names and not near:
            missing.append(names)
    assert not missing


@pytest.mark.parametrize("page", CHAPTERS, ids=ids(CHAPTERS))
def test_imports_only_from_lower_chapters(page):
    own = re.match(r"#\| default_exp (\w+)", cells(page)[0]["source"]).group(1)
    for c in cells(page):
        for module in re.findall(r"^\s*(?:from|import) deimv2_tfg\.(\w+)", c["source"], re.M):
            assert ORDER.index(module) <= ORDER.index(own), f"{page.stem} imports {module}"


@pytest.mark.parametrize("page", CHAPTERS, ids=ids(CHAPTERS))
def test_ends_in_files(page):
    assert any(re.search(r"\bsave_(figure|table)\(", c["source"]) for c in cells(page)[-4:])


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_stored_outputs_are_whole_fresh_and_small(page):
    from deimv2_tfg.cli import sources_fingerprint

    notebook = json.loads(page.read_text())
    assert notebook["metadata"]["stored_outputs"]["sources"] == sources_fingerprint(notebook), (
        "outputs of other sources: `make thesis pages`"
    )
    outputs = [c["outputs"] for c in notebook["cells"] if c["cell_type"] == "code"]
    assert sum(map(bool, outputs)) >= 1
    for o in (o for outs in outputs for o in outs):
        assert o["output_type"] != "error"
        text = json.dumps(o)
        assert len(text) < 400_000 and not re.search(
            r"/(?:home|root|work|tmp|Users)/", re.sub(r'"image/[^"]*": "[^"]*"', "", text)
        )
    assert page.stat().st_size < 3_000_000


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what the nbdev commands read and write."
    there = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "deimv2_tfg"):
        shutil.copytree(
            ROOT / name,
            there / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, there / name)
    return there


def run(command, where):
    subprocess.run(
        [str(Path(sys.executable).parent / command)],
        cwd=where,
        check=True,
        capture_output=True,
        timeout=300,
    )


def test_nbdev_export_leaves_no_difference(copy):
    run("nbdev_export", copy)
    for p in sorted((copy / "deimv2_tfg").glob("*.py")):
        assert p.read_text() == (ROOT / "deimv2_tfg" / p.name).read_text(), (
            f"{p.name} is behind its notebook: nbdev_export"
        )


def test_nbdev_clean_leaves_no_difference(copy):
    run("nbdev_clean", copy)
    for p in PAGES:
        assert json.loads((copy / "nbs" / p.name).read_text()) == json.loads(p.read_text()), (
            f"{p.name}: nbdev_clean"
        )


def test_the_package_is_only_what_was_exported():
    for p in (ROOT / "deimv2_tfg").glob("*.py"):
        assert p.name in {"__init__.py", "_modidx.py"} or "AUTOGENERATED" in p.read_text()[:400]


def test_requirements_name_every_package_that_is_imported():
    known = {
        "PIL": "pillow",
        "mpl_toolkits": "matplotlib",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
    }
    required = set(
        re.findall(
            r"([A-Za-z0-9_-]+)(?=[<>=])",
            re.search(r"^requirements = (.*)$", (ROOT / "settings.ini").read_text(), re.M).group(1),
        )
    )
    imported = set()
    for p in (ROOT / "deimv2_tfg").glob("*.py"):
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    missing = {
        known.get(m, m) for m in imported - set(sys.stdlib_module_names) - {"deimv2_tfg"}
    } - required
    assert not missing


def test_readme_shows_the_table_that_is_on_file():
    import csv

    readme = (ROOT / "README.md").read_text()
    table = re.search(r"thesis_figures/(\w+)/per_class_ap\.csv", readme).group(0)
    for row in csv.DictReader((ROOT / table).open()):
        assert (
            f"| {row['class']} | {row['objects']} | {float(row['AP']):.3f} | {float(row['AP50']):.3f} |"
            in readme
        )
    for row in csv.DictReader((ROOT / "thesis_figures/industrial6_compact/results.csv").open()):
        interval = lambda k: (
            f"{float(row[k]):.3f} [{float(row[k + ' low']):.3f}, {float(row[k + ' high']):.3f}]"
        )
        if row["AP"]:
            assert (
                f"| {row['model'].removesuffix(', 192 px')} | {int(float(row['images seen'])):,} | {row['seeds']} | {interval('AP')} | {interval('AP50')} |"
                in readme
            )
        if row["difference"]:
            assert (
                f"| {100 * float(row['difference']):+.1f} [{100 * float(row['difference low']):+.1f}, {100 * float(row['difference high']):+.1f}] |"
                in readme
            )
    ahead = {
        row["model"].split()[2].strip(","): 100 * float(row["difference"])
        for row in csv.DictReader((ROOT / "thesis_figures/industrial6_compact/results.csv").open())
        if row["model"].startswith("Faster")
    }
    assert f"**ahead of DEIMv2 by {ahead['resnet18']:.1f} points**" in readme and re.search(
        rf"EfficientNet-B0 behind by\s+{-ahead['efficientnet']:.1f}:", readme
    )
    for row in csv.DictReader((ROOT / "thesis_figures/industrial6_compact/text_effect.csv").open()):
        if row["true text against"] in ("permuted", "orthogonal"):
            assert (
                f"{100 * float(row['effect']):+.2f} [{100 * float(row['low']):+.2f}, {100 * float(row['high']):+.2f}]"
                in next(
                    l
                    for l in readme.splitlines()
                    if l.startswith(f"| {row['head'].replace('_', ' ')} |")
                )
            )
    bare, pretrained = csv.DictReader(
        (ROOT / "thesis_figures/industrial6_compact/pretraining.csv").open()
    )
    assert (
        f"AP {float(pretrained['AP']):.3f} against {float(bare['AP']):.3f}, {100 * float(pretrained['difference']):+.1f} points [{100 * float(pretrained['difference low']):+.1f}, {100 * float(pretrained['difference high']):+.1f}]".replace(
            " 0.", " ."
        )
        in readme
    )
    effects = list(
        csv.DictReader((ROOT / "thesis_figures/industrial6_compact/grid_effects.csv").open())
    )
    assert (
        all(float(row["diverged"]) == float(row["skipped"]) == 0 for row in effects)
        and f"of {sum(int(row['cells']) for row in effects if row['factor'] == 'rate')} cells"
        in readme
    )
    for row in effects:
        if (
            row["against"]
            and row["level"] != "none"
            or row["factor"] in ("clip", "warmup")
            and row["against"]
        ):
            assert (
                f"{100 * float(row['AP_difference']):+.1f} [{100 * float(row['low']):+.1f}, {100 * float(row['high']):+.1f}]"
                in readme
            ), row
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_every_chapter_has_its_row_in_readme_and_index():
    readme, index = (
        (ROOT / "README.md").read_text(),
        "".join(
            "".join(c["source"])
            for c in json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"]
        ),
    )
    for page in CHAPTERS:
        assert f"](nbs/{page.name})" in readme and f"]({page.name})" in index, page.name


@pytest.mark.parametrize("study", ["demo", "industrial6_compact"])
def test_the_index_of_a_study_lists_all_that_is_there(study):
    folder = ROOT / "thesis_figures" / study
    lines = (folder / "index.md").read_text().splitlines()
    for about in sorted(folder.glob("*.json")):
        if "kind" not in (told := json.loads(about.read_text())):
            continue
        line = next((l for l in lines if l.startswith(f"| {about.stem} |")), None)
        assert line and (told["commit"] or "")[:7] in line, about.name
