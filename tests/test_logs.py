"""The logs of many runs as one table: what it holds, and what a malformed file costs."""

import errno
import json

import pytest

from dnd_jax import logs
from dnd_jax.types import InputError


@pytest.fixture
def sweep(tmp_path):
    """Two workdirs written by hand as training writes them, `a` with two checkpoints, and a folder that is none."""
    for name, rate in (("a", 0.1), ("b", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": step, "loss": rate * step, "validation": {"x": step / 2}} for step in (2, 4)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 6, "lo')
        (folder / "config.json").write_text(json.dumps({"seed": 0, "train": {"rate": rate}, "blocks": [[1, 2], [3, 4]]}))
    for step in (4, 5):
        metrics = tmp_path / "a" / "checkpoints" / str(step) / "metrics"
        metrics.mkdir(parents=True)
        (metrics / "metrics").write_text(json.dumps({"validation_loss": step * 1.0}))
    (tmp_path / "a" / "checkpoints" / "7").mkdir()
    (tmp_path / "store").mkdir()
    return tmp_path


def test_a_line_that_does_not_reach_the_disk_is_written_again_and_once(tmp_path, monkeypatch, capsys):
    def fsync(descriptor):
        synced.append(len(synced) not in (1, 2))
        if not synced[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")

    synced = []
    with logs.MetricsLog(tmp_path, 0) as log:
        monkeypatch.setattr(logs.os, "fsync", fsync)
        for step in range(1, 5):
            log.append(step, {"loss": 1.0}, 1, 0.0)
            assert (log.failure is not None) == (step in (2, 3))
    assert [entry["step"] for entry in logs.read_metrics(tmp_path)] == [1, 2, 3, 4] and synced == [True, False, False, True]
    assert f"error: {tmp_path}/metrics.jsonl: not written: No space left on device" in capsys.readouterr().err


def events(folder):
    """Return the events of TensorBoard's files, in the order of their writing: records of length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_has_what_the_log_has_from_the_step_that_a_run_resumes_from(tmp_path):
    for first in (0, 2):
        with logs.MetricsLog(tmp_path, first, tensorboard=True) as log:
            for step in range(first + 1, first + 4):
                log.append(step, {"loss": 0.5 * step}, 1, 0.0)
    said = events(tmp_path / "tensorboard")
    assert [event.step for event in said if event.HasField("session_log")] == [1, 3]
    scalars = [(event.step, value.simple_value) for event in said for value in event.summary.value if value.tag == "loss"]
    assert scalars == [(step, 0.5 * step) for step in (1, 2, 3, 3, 4, 5)]
    assert {value.tag for value in said[2].summary.value} == logs.read_metrics(tmp_path)[0].keys() - {"step"}


def test_tensorboard_that_can_not_be_written_is_said_once_and_ends(tmp_path, capsys):
    with logs.MetricsLog(tmp_path, 0, tensorboard=True) as log:
        log._board._writer._writer.close()
        log._board._writer._writer = open("/dev/full", "wb")  # noqa: SIM115
        failed = []
        for step in range(1, 30):
            log.append(step, {"loss": 1.0}, 1, 0.0)
            failed.append(log.failure is not None)
    assert failed == [True] + [False] * 28 and len(logs.read_metrics(tmp_path)) == 29
    assert capsys.readouterr().err.count(f"error: {tmp_path}/tensorboard: not written: No space left on device") == 1


def test_lines_of_a_run_that_begins_anew_are_dropped_aloud(tmp_path, capsys):
    with logs.MetricsLog(tmp_path, 0) as log:
        log.append(1, {"loss": 1.0}, 1, 0.0)
    with logs.MetricsLog(tmp_path, 0):
        pass
    assert capsys.readouterr().out == f"{tmp_path}/metrics.jsonl: 1 lines dropped, as the run begins anew at step 0\n"


def test_columns_and_rows(sweep):
    table = logs.load_runs(f"{sweep}/*")
    assert list(table.columns) == ["run", "step", "checkpoint", "warnings", "loss", "validation_loss", "seconds", "validation.x",
                                   "config.seed", "config.train.rate", "config.blocks"]
    assert table["seconds"].isna().all()
    assert table["run"].str[-1].tolist() == ["a"] * 3 + ["b"] * 2 and table["step"].tolist() == [2, 4, 5, 2, 4]
    assert table["checkpoint"].tolist() == [False, True, True, False, False] and (table["warnings"] == "").all()
    assert table["loss"].tolist()[:2] == [0.2, 0.4] and table["loss"].isna().tolist() == [False, False, True, False, False]
    assert table["validation_loss"].dropna().tolist() == [4.0, 5.0] and table["validation.x"].dropna().tolist() == [1, 2, 1, 2]
    assert table["config.train.rate"].tolist() == [0.1] * 3 + [0.2] * 2 and set(table["config.blocks"]) == {"[[1, 2], [3, 4]]"}


@pytest.mark.parametrize("name,text,said,steps", [
    ("metrics.jsonl", '{"step": 2}\n{"step"\n{"step": 6}\n', "metrics.jsonl line 2: not JSON", [2, 4, 5, 6]),
    ("metrics.jsonl", '{"step": 2}\n[1]\n{"loss": 1}\n', "metrics.jsonl line 2: expected an object with an integer", [2, 4, 5]),
    ("metrics.jsonl", None, "metrics.jsonl: No such file", [4, 5]), ("config.json", "{", "config.json: not JSON", [2, 4, 5]),
    ("config.json", b"\xff", "config.json: ", [2, 4, 5]),
    ("checkpoints/4/metrics/metrics", "{", "checkpoints/4/metrics/metrics: not JSON", [2, 4, 5]),
    ("checkpoints/5/metrics/metrics", "[]", "checkpoints/5/metrics/metrics: expected an object", [2, 4]),
])
def test_a_malformed_file_is_named_and_costs_only_itself(sweep, name, text, said, steps):
    path = sweep / "a" / name
    path.unlink() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table = logs.load_runs(f"{sweep}/*")
    ours, theirs = (table[table["run"] == f"{sweep}/{run}"] for run in "ab")
    assert ours["step"].tolist() == steps and all(said in warning for warning in ours["warnings"])
    assert theirs["step"].tolist() == [2, 4] and (theirs["warnings"] == "").all()
    assert theirs["config.train.rate"].tolist() == [0.2, 0.2]


def test_a_run_without_any_step_has_a_row_and_no_run_is_an_error(sweep):
    (sweep / "b" / "metrics.jsonl").write_text("")
    last = logs.load_runs(f"{sweep}/*").iloc[-1]
    assert last["run"] == f"{sweep}/b" and last.isna()["step"] and last["config.train.rate"] == 0.2
    with pytest.raises(InputError, match=r"store: no folder of that name holds metrics\.jsonl or checkpoints"):
        logs.load_runs(f"{sweep}/store")


def test_what_training_writes(smoke):
    table = logs.load_runs(f"{smoke}/build/*/run")
    assert table["run"].unique().tolist() == [f"{smoke}/build/tenants-smoke/run"] and (table["warnings"] == "").all()
    assert table["step"].tolist() == [1, 2, 3, 4] and table["loss"].notna().all() and (table["config.train.steps"] == 4).all()
    assert table.loc[table["checkpoint"], "step"].tolist() == [2, 4]
    logged = [entry.get("validation_loss") for entry in logs.read_metrics(smoke / "build" / "tenants-smoke" / "run")]
    assert table["validation_loss"].dropna().tolist() == [loss for loss in logged if loss is not None]
