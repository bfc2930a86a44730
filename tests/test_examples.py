"""The notebook of examples/: its cells are those of its script, and they run."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from shared import TINY_SWIN

import orca_rank
from orca_rank.stages import finetune

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOK = json.loads((FOLDER / "own_model.ipynb").read_text())


def maker():
    spec = importlib.util.spec_from_file_location("make_notebook", FOLDER / "make_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_its_script_executed():
    written = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
    assert written == maker().cells((FOLDER / "own_model.py").read_text())
    outputs = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len((FOLDER / "own_model.ipynb").read_bytes()) < 300_000


@pytest.mark.slow
def test_the_cells_of_the_notebook_run():
    names: dict = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            maker().run("".join(cell["source"]), names)
    assert names["trained"] == names["plan"].parameters(names["gaps"])


PAGE = (FOLDER.parent / "docs" / "own-script.md").read_text()


def test_the_pages_show_every_function_of_the_namespace():
    code = "".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    code += "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    types = {"Budget", "Gaps", "RankPlan"}  # what functions take and give
    assert {*re.findall(r"orca\.(\w+)", code)} >= {*orca_rank.__all__} - types


@pytest.mark.slow
def test_the_code_of_the_page_for_scripts_runs(composed, tmp_path, monkeypatch):
    options = ("data=digits", "data.train_limit=24", "data.test_limit=16", *TINY_SWIN, "embedder.aligned=false",
               "rank=uniform", "rank.r=1", "finetune.epochs=1", "trainer.enable_progress_bar=false")  # fmt: skip
    finetune.run(composed("stage=finetune", *options))
    monkeypatch.chdir(tmp_path)  # whose runs/default it is
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict = {"images": torch.rand(3, 1, 8, 8).numpy()}
    for block in blocks:
        exec(compile(block, "docs/own-script.md", "exec"), names)
    assert len(blocks) > 5
    assert len(names["of_text"].layers) == 6 and all(layer.gap["mmd"].value > 0.5 for layer in names["of_text"].layers)
    assert names["plan"].ranks and names["logits"].shape == (16, 10)
    assert names["answer"].shape == (3, 10)
    assert names["distances"]["mmd"]["after"]["value"] < names["distances"]["mmd"]["before"]["value"]
