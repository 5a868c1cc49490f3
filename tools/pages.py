"""Stored pages: `make pages` gives the notebooks the outputs of a study's executed ones.

They can then be read where they are shown. A page that was executed from other sources is refused,
and a fingerprint of its sources is written down: a test tells when a page shows outputs of others.
"""

import base64
import io
import json
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

from deimv2_tfg.core import hash_bytes, project_root, read_json, write_json


def sources_fingerprint(notebook: dict) -> str:
    """Hash of a notebook's cell sources, outputs left out."""
    return hash_bytes(*("".join(cell["source"]).encode() for cell in notebook["cells"]))


def lighter(output: dict, most: int = 150_000) -> dict:
    """A cell's output whose large PNG pictures (base64 characters over `most`) became JPEG."""
    data = output.get("data", {})
    if len(data.get("image/png", "")) > most:
        drawn = io.BytesIO()
        picture = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png"))))
        picture.convert("RGB").save(drawn, "JPEG", quality=80)
        data["image/jpeg"] = base64.b64encode(drawn.getvalue()).decode()
    return output


def told_outputs(cell: dict) -> list[dict]:
    """A cell's outputs as they are stored: without warnings, widgets and this machine's folders."""
    outputs = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    widget = "application/vnd.jupyter.widget-view+json"
    kept = [lighter(o) for o in outputs if widget not in o.get("data", {})]
    told = json.dumps(kept).replace(f"{project_root()}/", "")
    return json.loads(re.sub(rf"{tempfile.gettempdir()}/tmp\w+/", "", told))


def store_pages(executed: str | Path):
    """Copy the outputs of executed pages into `nbs/`. Raises `ValueError` for other sources."""
    for path in sorted(Path(executed).glob("*.ipynb")):
        ran = {cell["id"]: cell for cell in read_json(path)["cells"]}
        stored = project_root() / "nbs" / path.name
        page = read_json(stored)
        cells = [ran.get(cell["id"], {"source": ""}) for cell in page["cells"]]
        fingerprint = sources_fingerprint({"cells": cells})
        if fingerprint != sources_fingerprint(page):
            raise ValueError(f"{path}: executed from other sources than nbs/; run `make thesis`")
        for cell in page["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = told_outputs(ran[cell["id"]])
        study = Path(executed).resolve().parent.name
        page["metadata"]["stored_outputs"] = {"study": study, "sources": fingerprint}
        write_json(stored, page)


if __name__ == "__main__":
    store_pages(sys.argv[1])
