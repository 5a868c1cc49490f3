"""Reads everything from settings.ini, as nbdev does: one place for name, version and requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8")
    if (here / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["deimv2_tfg", "deimv2_tfg.*"]),
    include_package_data=True,
    package_data={
        "deimv2_tfg": [
            "*.csv",
            "*.json",
            "published.yml",
            "*.safetensors",
            "recipes/*.yml",
            "*.mplstyle",
            "*.j2",
            "locale/*/LC_MESSAGES/*.po",
            "models/*/*",
        ]
    },
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        extra: cfg[f"{extra}_requirements"].split()
        for extra in ("dev", "export", "imagenet", "slurm", "text", "video")
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
