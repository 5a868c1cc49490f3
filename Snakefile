# The workflow of a study: its data, its trainings, its chapters, in the order in which they need each other.
#   snakemake --configfile studies/demo.yaml --cores 2       what `make thesis` calls; -n shows what would run
#   snakemake --configfile studies/thesis.yaml --profile profiles/slurm --config data_dir=/data/set
# A chapter runs again when its cells, a module that it imports, or something upstream has changed;
# outputs and comments of a notebook do not count.
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from deimv2_tfg.core import PROFILES, open_study, project_root

HERE = Path(workflow.basedir)
CHAPTERS = sorted(path.stem for path in (HERE / "nbs").glob("*.ipynb"))
# What a chapter reads of other chapters' results, by module; imports say the rest.
READS = {
    "errors": ["baselines"],
    "index": CHAPTERS,
    "memoria": ["baselines", "errors", "09_pretraining", "results", "text_changes", "thesis"],
    "thesis": ["baselines", "multimodal"],
}
TRAINS = {"training", "stability", "04d_levers", "multimodal", "text_changes", "baselines"}
TRAINS |= {"09_pretraining"}

study = open_study(
    config.get("profile"), config.get("data_dir"), config.get("study"), config.get("seed", 0)
)
RUNS = f"runs/{study.name}"
OWN = study.data_dir is not None
HOME = project_root()
DATA = study.data_dir or HOME / f"runs/data/synthetic-{study.profile.name}-{study.seed}"
PROFILE = PROFILES[study.profile.name]
GPU = int(config.get("gpu", 0))
TRAINING = {
    "model": PROFILE.model,
    "init": PROFILE.init,
    "image_size": PROFILE.image_size,
    "epochs": PROFILE.epochs,
    "batch_size": PROFILE.batch_size,
    "lr": PROFILE.lr,
    "eval_every": max(1, PROFILE.epochs // 44),
    "seed": study.seed,
    "precision": "auto" if OWN else "no",  # the built-in photographs: the same figures everywhere
}
TRAININGS = {"phase1": {}} | (config.get("trainings") or {})
if "DEIMV2_TFG_PHASE1" in os.environ:  # a run that was trained elsewhere takes its place
    del TRAININGS["phase1"]


@cache
def cells(chapter):
    """The code of a chapter's cells."""
    notebook = json.loads((HERE / f"nbs/{chapter}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def imported(text):
    """Modules of the package that a text of Python imports."""
    return set(re.findall(r"^\s*from (?:deimv2_tfg)?\.(\w+) import", text, re.M))


@cache
def module_text(name):
    path = HERE / f"deimv2_tfg/{name}.py"
    return path.read_text(encoding="utf-8") if path.exists() else ""


@cache
def modules_of(chapter):
    """Modules that a chapter's page reaches, in order of their names."""
    waiting = imported("\n".join(cells(chapter)))
    reached = set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= imported(module_text(name)) - reached
    return sorted(reached)


def code_of(chapter):
    """Hash of all that a page executes: a comment in its own cells counts, an output does not."""
    texts = [*cells(chapter), *map(module_text, modules_of(chapter))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


@cache
def module_of(chapter):
    found = re.search(r"#\| *default_exp (\w+)", "\n".join(cells(chapter)))
    return found.group(1) if found else chapter


def page(chapter):
    return f"{RUNS}/pages/{chapter}.ipynb"


def upstream(wildcards):
    """Pages and trainings that a chapter reads."""
    wanted = READS.get(module_of(wildcards.chapter), [])
    needed = [page(c) for c in CHAPTERS if {c, module_of(c)} & {*wanted} and c != wildcards.chapter]
    if "phase1" in TRAININGS and "phase1_run(" in "\n".join(cells(wildcards.chapter)):
        needed.append(f"{RUNS}/trainings/phase1.txt")
    return needed


def page_parameters(wildcards):
    """The page's parameters, as papermill's options."""
    given = {"profile": study.profile.name, "study": study.name, "seed": study.seed}
    if OWN:
        given["data_dir"] = DATA
    given |= (config.get("parameters") or {}).get(wildcards.chapter, {})
    return " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in given.items())


def training_options(wildcards):
    """A training's options, as those of `deimv2-tfg train`."""
    given = TRAINING | TRAININGS[wildcards.name]
    return " ".join(f"--{name} {value}" for name, value in given.items())


def warm_up():
    """Start the process whose forks are papermill and the pages' kernels (see studies/warm.py)."""
    place = Path(tempfile.mkdtemp(prefix="deimv2-"))
    program = [sys.executable, str(HERE / "studies/warm.py")]
    argv = [program[0], "-S", program[1], "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}
    spec = place / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(kernel))
    os.environ |= {"JUPYTER_PATH": str(place), "WARM": str(place / "socket")}
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with (place / "log").open("w") as log:  # else it would keep snakemake's own output open
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        subprocess.Popen([*program, "serve", os.environ["WARM"]], env=one_thread, **output)


onstart:
    if not GPU:  # a GPU's driver does not survive a fork
        warm_up()


localrules:
    all,


rule all:
    input:
        [page(chapter) for chapter in CHAPTERS],
        [f"{RUNS}/trainings/{name}.txt" for name in TRAININGS],
        f"{RUNS}/card.txt" if GPU else [],


# What the card gives, before anything is trained on it.
rule card:
    output:
        f"{RUNS}/card.txt",
    resources:
        gpu=GPU,
        runtime=10,
    priority: 200
    message:
        "self-check of the card"
    shell:
        "deimv2-tfg bench card > {output}"


# The photographs: those given are looked at, the built-in ones are drawn.
rule data:
    output:
        f"{RUNS}/data.txt",
    input:
        [f"{DATA}/{split}/{split}.json" for split in ("train", "val", "test")] if OWN else [],
    params:
        command="doctor" if OWN else "synth",
        options="" if OWN else f"--profile {study.profile.name} --seed {study.seed}",
    priority: 100
    message:
        f"photographs: {DATA}"
    shell:
        "deimv2-tfg {params.command} '{DATA}' {params.options} > {output}"


# A training is one command, which resumes where it was cut off; its last line is the run.
rule training:
    output:
        f"{RUNS}/trainings/{{name}}.txt",
    input:
        f"{RUNS}/data.txt",
    params:
        options=training_options,
    threads: config.get("train_threads", 2)
    resources:
        gpu=GPU,
        mem_mb=config.get("train_mb", 4000),
        runtime=config.get("train_minutes", 60),
    priority: 50
    message:
        "training {wildcards.name}: {params.options}"
    shell:
        "OMP_NUM_THREADS={threads} deimv2-tfg train '{DATA}' --runs_dir '{HOME}/{RUNS}'"
        " {params.options} | tee {output}.part && tail -1 {output}.part > {output}"
        " && rm {output}.part"


# The pages that wait for one another are begun first, so that the others fill the cores beside them.
WAITED_FOR = "|".join(c for c in CHAPTERS if module_of(c) in {"baselines", "multimodal", "thesis"})


# A page, executed. What is left of one that failed is beside it, in failed/.
rule chapter:
    wildcard_constraints:
        chapter=rf"(?!({WAITED_FOR})\.)[^/]+",
    output:
        f"{RUNS}/pages/{{chapter}}.ipynb",
    input:
        upstream,
        f"{RUNS}/data.txt",
        notebook=ancient(lambda wildcards: HERE / f"nbs/{wildcards.chapter}.ipynb"),
    params:
        code=lambda wildcards: code_of(wildcards.chapter),
        begun=f"{RUNS}/failed/{{chapter}}.ipynb",
        given=page_parameters,
    message:
        "chapter {wildcards.chapter}"
    resources:
        gpu=lambda wildcards: GPU if module_of(wildcards.chapter) in TRAINS else 0,
        mem_mb=config.get("chapter_mb", 3000),
        runtime=config.get("chapter_minutes", 30),
    shell:
        "start=$(date +%s) && mkdir -p {RUNS}/failed && export TQDM_DISABLE=1 OMP_NUM_THREADS={threads}"
        " && python -S '{HERE}/studies/warm.py' papermill --no-progress-bar --log-level ERROR -k python3 '{input.notebook}' '{params.begun}' {params.given}"
        " 2> >(grep -v IPKernelApp >&2) && mv '{params.begun}' '{output}'"
        ' && echo "{wildcards.chapter}: $(($(date +%s) - start)) s"'


use rule chapter as waited_for with:
    wildcard_constraints:
        chapter=WAITED_FOR,
    priority: 40
