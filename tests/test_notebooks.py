"""The notebooks, executed by nbmake on the miniature world; committed without outputs."""

import json
import re
import shutil

import nbformat
import pytest
from conftest import ROOT, SMOKE, make_store, run_module, tiny_config

from dnd_jax import train, workdirs
from dnd_jax.types import InputError
from experiments.ablations import conditions, pictures
from experiments.configs import common_sense, tenants

FOLDER = ROOT / "experiments" / "ablations"
PICTURES = {"sweep": 1, "anatomy": 3, "conditions": 2}
QUICK = ("draws=1", "top_k=(2,)", "temperatures=(1.0,)", "penalties=(1.0,)", "ridge_draws=1")


@pytest.fixture(scope="module")
def executed(smoke):
    """The executed notebooks by name, after a variant of the conditions was trained and evaluated."""
    run_module("experiments.ablations.conditions", SMOKE, "--variants=prompts-4", "--config.train.steps=2",
               *(f"--config.evaluate.{field}" for field in QUICK), cwd=smoke)
    folder = smoke / "experiments" / "ablations"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (folder / f"{name}.ipynb").write_text((FOLDER / f"{name}.ipynb").read_text())
    done = run_module("pytest", "--nbmake", "--overwrite", "-p", "no:cacheprovider", *(f"{name}.ipynb" for name in PICTURES),
                      cwd=folder, env={"DND_WORLD": f"{smoke}/build/tenants-smoke"}, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return {name: nbformat.read(folder / f"{name}.ipynb", 4) for name in PICTURES}


@pytest.mark.parametrize("name", PICTURES)
def test_every_cell_ran_and_the_pictures_are_there(executed, name):
    cells = [cell for cell in executed[name].cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.execution_count for cell in cells) and not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], outputs
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]


def test_what_the_tables_say(executed, smoke):
    text = {name: json.dumps(book.cells) for name, book in executed.items()}
    assert "conditions/prompts-4/run" in text["sweep"] and "config.condition.prompts" in text["sweep"]
    assert "6 training tasks, 2 held out" in text["anatomy"] and "cosine_trained" in text["anatomy"]
    report = conditions.load(smoke / "build" / "tenants-smoke" / "conditions")["prompts-4"]
    assert report["verdict"] in text["conditions"] and "dnd_shuffled" in text["conditions"]


def test_runs_without_validation_tasks_are_compared_too(tmp_path, rng):
    store = make_store(tmp_path / "store", rng, validation=0)
    for rate in (1e-3, 1e-2):
        train.run(tiny_config(store, learning_rate=rate), tmp_path / "world" / str(rate) / "run")
    repository = tmp_path / "repository"  # as a user has it, who has installed the requirements only
    for name in ("dnd_jax", "data_pipeline"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).symlink_to(ROOT / name)
    folder = shutil.copytree(FOLDER, repository / "experiments" / "ablations", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_module("pytest", "--nbmake", "--overwrite", "-p", "no:cacheprovider", "sweep.ipynb", cwd=folder,
                      env={"DND_WORLD": str(tmp_path / "world"), "PYTHONPATH": ""}, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    said = json.dumps(nbformat.read(folder / "sweep.ipynb", 4).cells)
    assert "0.001/run" in said and "0.01/run" in said and "with 1 Axes" in said


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_notebooks_are_clean_and_their_cells_short(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert path.stem in PICTURES and book.cells[0].cell_type == "markdown"
    for before, cell in zip(book.cells, book.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None and cell.source.count("\n") < 6
            assert before.cell_type == "markdown" and re.search(r"[.?:]$", before.source)


def test_a_variant_is_evaluated_only_when_trained_and_only_kept_of_its_config(tmp_path, monkeypatch, capsys):
    config = tenants.get_config("smoke").unlock()
    config.tasks, done = str(tmp_path / "tasks.json"), []
    workdir = tmp_path / "conditions" / "prompts-4" / "run"
    monkeypatch.setattr(conditions.export, "export", lambda config: done.append("export"))
    monkeypatch.setattr(conditions.train, "run", lambda config, workdir: done.append("train"))  # as on SIGTERM: it returns
    monkeypatch.setattr(conditions.evaluate, "climb", lambda config, workdir: done.append("evaluate"))
    with pytest.raises(InputError, match="prompts-4/run: training ended before step 4"):
        conditions.run(config, "prompts-4")
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    conditions.run(config, "prompts-4")
    assert done == ["export", "train", "export", "train", "evaluate"]
    workdirs.claim(conditions.vary(config, "prompts-4"), workdir)
    (workdir / "report.json").touch()
    conditions.run(config, "prompts-4")
    assert len(done) == 5 and capsys.readouterr().out.endswith("prompts-4: has its report\n")
    config.collect.steps = 7
    with pytest.raises(InputError, match=r"prompts-4/run/config\.json: collect\.steps is 2, the config given says 7"):
        conditions.run(config, "prompts-4")


def test_variants_differ_in_what_they_say_and_leave_the_config_alone():
    config = tenants.get_config()
    whole = config.to_json()
    changed = [conditions.vary(config, name) for name in conditions.VARIANTS]
    assert config.to_json() == whole and len({c.export.store for c in changed}) == len(conditions.VARIANTS)
    assert [c.condition.form for c in changed[:4]] == ["prompt", "prompt+answer", "answer", "mix"]
    assert [c.condition.prompts for c in changed[4:]] == [4, 7, 28] and {c.train.steps for c in changed} == {config.train.steps}
    with pytest.raises(InputError, match=r"config\.tasks is a table"):
        conditions.vary(common_sense.get_config("ARC-c"), "form-mix")


def test_pictures_of_conditions_have_the_rungs_that_all_reports_have(tmp_path):
    rung = {"mean": 0.5, "ci95": [0.4, 0.6]}
    for variant, prompts, form, rungs in (("form-prompt", 128, "prompt", ("dnd", "nearest")), ("form-mix", 128, "mix", ("dnd",)),
                                          ("prompts-4", 4, "prompt", ("dnd", "nearest"))):
        folder = tmp_path / variant / "run"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"form": form, "rungs": dict.fromkeys(rungs, rung)}))
        (folder / "config.json").write_text(json.dumps({"condition": {"prompts": prompts}}))
    reports = conditions.load(tmp_path)
    (axes,) = pictures.ladders(reports).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dnd"]
    (axes,) = pictures.by_count(reports).axes
    assert list(axes.get_xticks()) == [4, 128] and [text.get_text() for text in axes.get_legend().get_texts()] == ["dnd"]
