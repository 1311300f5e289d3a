"""examples/what-awq-does.ipynb: it runs, and what is stored in it reads well without running it."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "what-awq-does.ipynb"


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs_of(notebook) if output.output_type == "stream")


def plots(notebook):
    return [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


def errors(text):
    """Of the layer rounded, and with AWQ; of the logits with AWQ, and without."""
    layer = re.search(r"rounded ([\d.]+)%, AWQ ([\d.]+)%", text).groups()
    logits = re.search(r"logits move by ([\d.]+)%; rounded without AWQ by ([\d.]+)%", text).groups()
    return [float(n) for n in (*layer, *logits)]


def test_it_runs(workshop, tiny_models, monkeypatch):
    for name, value in workshop.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODEL", str(tiny_models["llama"]))
    notebook = nbformat.read(workshop.folder / "examples" / NOTEBOOK.name, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(workshop.folder / "examples")}})
    client.execute()
    rounded, awq, *_ = errors(printed(notebook))
    assert awq < rounded
    # The mapping is exact.
    assert float(re.search(r"the logits move by (\S+)\n", printed(notebook))[1]) < 1e-5
    assert len(plots(notebook)) == len(plots(nbformat.read(NOTEBOOK, as_version=4)))


def test_what_is_stored_is_whole():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(plots(notebook)) == 4
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    rounded, awq, awq_logits, rounded_logits = errors(printed(notebook))
    assert awq < rounded
    assert awq_logits < rounded_logits
    assert NOTEBOOK.stat().st_size < 300_000


def test_nothing_stored_is_a_path_of_somebody():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r'"[^"]*(/home/|/tmp/|/root/|/Users/)', text)
