"""Run directories: what they refuse, what they keep, what they distrust."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from networks import rows
from safetensors.numpy import load_file, save_file
from torch import nn

import retrain
from retrain.files import json_bytes, plain, write_whole
from retrain.runs.directory import open_run, read_record
from retrain.stream.chain import Chain
from retrain.stream.details import PlainDetails
from retrain.stream.layer_report import LayerReport
from solvers import Status

LAYERS = ("0", "1")
IDENTITY = {"seed": 0, "options": {"epsilon": 0.05, "memory": float("inf")}}


def opened(path, identity=IDENTITY):
    return open_run(path, identity, LAYERS)


# --- identity and lock ------------------------------------------------------------------------


def test_an_interrupted_run_is_there_and_the_same_identity_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "run"):
        raise KeyboardInterrupt
    assert read_record(tmp_path / "run")["state"] == "running"
    with opened(tmp_path / "run"):  # an infinite option is equal to itself though JSON has none
        pass


def test_another_identity_says_what_differs(tmp_path):
    with opened(tmp_path):
        pass
    changed = {"seed": 1, "options": {"epsilon": 0.1, "memory": float("inf")}}
    with pytest.raises(
        ValueError, match=r"belongs to another run \(options.epsilon was 0.05, is"
    ) as e:
        opened(tmp_path, changed).__enter__()
    assert "seed was 0, is 1" in str(e.value)


def test_a_locked_directory_refuses_and_keeps_its_holder(tmp_path):
    with opened(tmp_path):
        with pytest.raises(ValueError, match="in use by another process"), opened(tmp_path):
            pass
        assert (tmp_path / "run.json").exists()
    with opened(tmp_path):
        pass


def test_a_new_run_that_fails_leaves_nothing(tmp_path):
    for folder, there in (("new", False), ("empty", True)):
        if there:
            (tmp_path / folder).mkdir()
        with pytest.raises(ZeroDivisionError), opened(tmp_path / folder):
            raise ZeroDivisionError
        assert (tmp_path / folder).exists() == there
        assert not there or not list((tmp_path / folder).iterdir())


def test_a_resumed_run_that_fails_leaves_what_there_was(tmp_path):
    with opened(tmp_path):
        pass
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ZeroDivisionError), opened(tmp_path):
        raise ZeroDivisionError
    assert (tmp_path / "run.json").read_bytes() == before


def test_layers_of_an_unknown_run_are_not_taken_over(tmp_path):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "000.safetensors").touch()
    with pytest.raises(ValueError, match="holds no run"), opened(tmp_path):
        pass


@pytest.mark.parametrize("part", ["lock", "layers"])
def test_links_are_refused_and_what_they_point_at_is_untouched(tmp_path, part):
    outside, run = tmp_path / "outside", tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_bytes(json_bytes({"format": 1, "identity": plain(IDENTITY)}))
    if part == "lock":
        outside.write_text("mine")
    else:
        outside.mkdir()
        (outside / ".000.safetensors.1.tmp").write_text("mine")
    (run / part).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link"), opened(run):
        pass
    kept = outside if part == "lock" else outside / ".000.safetensors.1.tmp"
    assert kept.read_text() == "mine"


# --- damaged records --------------------------------------------------------------------------

RECORDS = {
    "empty": (b"", "is damaged"),
    "truncated": (b'{"format": 1, "identity": {', "is damaged"),
    "not text": (b"\xff\xfe\x00", "is damaged"),
    "deep": (b"[" * 200_000, "is damaged"),
    "a list": (b"[1, 2]", "not a run's record"),
    "other format": (b'{"format": 99}', "not a run's record of format 1"),
    "no identity": (b'{"format": 1}', "belongs to another run"),
    "odd identity": (b'{"format": 1, "identity": [1]}', "belongs to another run"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_damaged_records_are_refused(tmp_path, name):
    content, said = RECORDS[name]
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=said), opened(tmp_path):
        pass
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_huge_record_is_not_read(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match="too large"):
        read_record(tmp_path)


def test_a_record_of_the_largest_size_is_read(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    file.write_bytes(json_bytes({"format": 1}))
    size = file.stat().st_size
    monkeypatch.setattr("retrain.files.LARGEST", size)
    assert read_record(tmp_path) == {"format": 1}
    monkeypatch.setattr("retrain.files.LARGEST", size - 1)
    with pytest.raises(ValueError, match="too large"):
        read_record(tmp_path)


def test_no_record(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        read_record(tmp_path)


# --- damaged layers ---------------------------------------------------------------------------


def chain():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(9, 6)), rng.normal(size=(7, 4))]
    return Chain(tuple(weights), (True, True), ("relu", "linear"))


def data():
    return np.random.default_rng(1).normal(size=(30, 8))


@pytest.fixture
def run(tmp_path):
    retrain.net_trim(chain(), data(), out=tmp_path / "run")
    return tmp_path / "run"


def repeat(run):
    return retrain.net_trim(chain(), data(), out=run)


def rewrite(run, *, weight=None, report=None, name="weight.0"):
    file = run / "layers" / "000.safetensors"
    values = load_file(file)["weight.0"] if weight is None else weight
    if report is None:
        report = json.dumps(repeat(run).layers[0].to_json())
    save_file({name: values}, file, metadata={"report": report})


def test_a_finished_layer_is_read_not_solved(run):
    """The file's weights are what the run goes on with, even if they are not what a solve gives."""
    weight = load_file(run / "layers" / "000.safetensors")["weight.0"]
    weight[0, 0] = 0.625
    rewrite(run, weight=weight)
    again = repeat(run)
    assert again.model.weights[0][0, 0] == 0.625
    assert load_file(run / "model.safetensors")["0"][0, 0] == 0.625


def test_only_what_is_missing_is_done_again(run):
    """Also where a later layer is there: a parallel run finishes them in any order."""
    first, second = (run / "layers" / f"00{index}.safetensors" for index in (0, 1))
    before, stamp = load_file(first)["weight.0"], second.stat().st_mtime_ns
    first.unlink()
    repeat(run)
    assert second.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(load_file(first)["weight.0"], before)


def test_a_layer_that_must_stay_hides_no_finished_one(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    x = rows(30, 5)
    retrain.net_trim(model, x, out=tmp_path)
    files = sorted((tmp_path / "layers").iterdir())
    stamps = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2
    retrain.net_trim(model, x, out=tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == stamps


SPOILT = {
    "shape": {"weight": np.zeros((9, 7))},
    "dtype": {"weight": np.zeros((9, 6), np.float32)},
    "integers": {"weight": np.zeros((9, 6), np.int64)},
    "NaN": {"weight": np.full((9, 6), np.nan)},
    "name": {"name": "weight.1"},
    "no report": {"report": "{}"},
    "list report": {"report": "[1]"},
    "number report": {"report": "5"},
    "cut report": {"report": '{"name": '},
    "deep report": {"report": "[" * 100_000},
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_layers_are_refused_by_name(run, how):
    rewrite(run, **SPOILT[how])
    with pytest.raises(ValueError, match=r"000\.safetensors is damaged .*delete it"):
        repeat(run)


@pytest.mark.parametrize("field", ["name", "shape", "weights", "certified", "error", "details"])
def test_reports_of_other_types_are_refused(run, field):
    report = repeat(run).layers[0].to_json()
    for value in ("7" if field != "name" else "1", None, [1, "2"]):
        if field == "error" and value is None:
            continue  # a NaN
        rewrite(run, report=json.dumps({**report, field: value}))
        with pytest.raises(ValueError, match="is damaged"):
            repeat(run)


def test_bytes_that_lie_are_refused(run):
    file = run / "layers" / "000.safetensors"
    whole = file.read_bytes()
    header = b'{"weight.0":{"dtype":"F64","shape":[1000000000,6],"data_offsets":[0,48000000000]}}'
    for content in (
        b"",
        whole[:-8],
        whole[:20],
        (2**63).to_bytes(8, "little") + whole[8:],
        len(header).to_bytes(8, "little") + header,
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            repeat(run)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="is damaged"):
        repeat(run)
    file.rmdir()
    assert repeat(run).certified  # deleted, as the message says, it is done again
    assert file.read_bytes()[-8 * 9 * 6 :] == whole[-8 * 9 * 6 :]


def test_swapped_layers_are_refused(tmp_path):
    """Two layers of one shape: their files tell whose they are."""
    rng = np.random.default_rng(0)
    square = Chain(
        tuple(rng.normal(size=(5, 4)) for _ in range(2)), (True, True), ("relu", "linear")
    )
    inputs = rng.normal(size=(20, 4))
    retrain.net_trim(square, inputs, out=tmp_path)
    first, second = (tmp_path / "layers" / f"00{index}.safetensors" for index in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ValueError, match="its report is not of layer '0'"):
        retrain.net_trim(square, inputs, out=tmp_path)


def test_reports_survive_the_way_through_json_with_nan():
    report = LayerReport(
        "fc", "linear", (3, 2), "relu", "own", 6, 0, 2, 5, 5, Status.NUMERICAL_ERROR, False, 2,
        float("nan"), float("inf"), 0.1, PlainDetails({"gap": float("nan")}),
    )  # fmt: skip
    text = json_bytes(report.to_json()).decode()
    assert "NaN" not in text
    assert "Infinity" not in text
    back = LayerReport.from_json(json.loads(text))
    assert np.isnan(back.error)
    assert back.details == PlainDetails({"gap": None})
    assert back.status is Status.NUMERICAL_ERROR


# --- files ------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    file = tmp_path / "a"
    write_whole(file, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_whole(file, b"new")
    assert error.value.filename == str(file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_of_the_same_file_is_removed(tmp_path):
    """Also where no run directory sweeps: beside verify.json, search.json, the demo's network."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    file = tmp_path / "a[1].json"
    stale = tmp_path / f".a[1].json.{ended.pid}.tmp"
    kept = [
        tmp_path / f".a[1].json.{os.getppid()}.tmp",  # of a process that may still write it
        tmp_path / f".a1.json.{ended.pid}.tmp",
        tmp_path / ".a[1].json.notes.tmp",
    ]
    for path in (stale, *kept):
        path.write_text("half")
    write_whole(file, b"whole")
    assert file.read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == sorted([file, *kept])


def test_a_directory_that_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
    """Permission is simulated: the tests may run as root, who has every one."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(PermissionError), opened(tmp_path / "run"):
        pass


def test_the_folders_above_a_run_are_made(tmp_path):
    with opened(tmp_path / "some" / "where" / "run"):
        pass
    assert read_record(tmp_path / "some" / "where" / "run")["state"] == "running"


def test_the_first_unknown_entry_of_a_report_is_named(run):
    report = {**repeat(run).layers[0].to_json(), "aa": 1, "bb": 2}
    rewrite(run, report=json.dumps(report))
    with pytest.raises(ValueError, match="unknown entry 'aa'"):
        repeat(run)
