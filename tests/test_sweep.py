# SPDX-License-Identifier: Apache-2.0
"""Many runs from one file."""

import json

import pytest
from helpers.runs import NORMALISATION, SHAPE, write_images, write_model, zsq, zsq_json

from zsq.errors import UsageError
from zsq.sweep import Sweep, run_sweep

SETTINGS = """
schedule: quick
settings: [synthesis.images=8, synthesis.steps=2, synthesis.batch=8, tuning.steps=2, tuning.batch=4]
"""


def write_sweep(folder, recipes, seeds="[0]", data=None):
    model = write_model(folder)
    options = [f"{SHAPE[0]}={SHAPE[1]}", f"{NORMALISATION[0]}={NORMALISATION[1]}",
               f"{NORMALISATION[2]}={NORMALISATION[3]}", "--no-compile", "--no-report"]  # fmt: skip
    text = (
        f"models: [{model}]\nrecipes: {recipes}\nseeds: {seeds}\noptions: {json.dumps(options)}\n"
    )
    text += SETTINGS + (f"data: {data}\n" if data else "")
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


def test_a_sweep_fills_its_table_and_only_does_what_is_missing(tmp_path, monkeypatch, capsys):
    data = write_images(tmp_path / "images")
    file = write_sweep(tmp_path, "[genie]", "[0, 1]", data)
    first = zsq_json(monkeypatch, capsys, "sweep", file, "-o", tmp_path / "out", "--workers", 2)
    assert [row["status"] for row in first["cells"]] == ["done", "done"]
    assert [row["seed"] for row in first["cells"]] == [0, 1]
    assert all({"student", "drop", "ratio", "protocol"} <= set(row) for row in first["cells"])
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.count("edges-8bit") == 2
    runs = [tmp_path / "out" / row["folder"] for row in first["cells"]]
    before = [(run / "student.safetensors").stat().st_mtime_ns for run in runs]
    again = zsq_json(monkeypatch, capsys, "sweep", file, "-o", tmp_path / "out")
    assert again == first
    assert before == [(run / "student.safetensors").stat().st_mtime_ns for run in runs]


def test_a_cell_that_fails_says_why_and_stops_nothing(tmp_path, monkeypatch, capsys):
    file = write_sweep(tmp_path, "[nonsense, genie]")
    code, out, _ = zsq(monkeypatch, capsys, "sweep", file, "-o", tmp_path / "out", "--quiet")
    assert code == 1
    assert "1 of 2 cells failed" in out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert "nonsense" in rows[0]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("recipes: [genie]", "models"), ("models: []\nrecipes: [a]", "models"), ("a: [", "cannot be read"),
     ("models: [a]\nrecipes: [b]\ncolour: red", "colour")],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        Sweep.load(tmp_path / "s.yaml")


def test_a_missing_file_and_no_worker_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        Sweep.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="at least 1"):
        run_sweep(Sweep(models=("a",), recipes=("b",)), tmp_path, workers=0)


def test_cells_have_folders_of_their_own():
    sweep = Sweep(
        models=("a:b", "c/d.py:e"),
        recipes=("gdfq", "gdfq+ait"),
        bits=("w4a4", "w3a3"),
        seeds=(0, 1),
    )
    folders = [cell.folder for cell in sweep.cells()]
    assert len(set(folders)) == len(folders) == 16
    assert not any("/" in folder or ":" in folder for folder in folders)
