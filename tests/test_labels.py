"""Labels of every make: read where they can mean one thing, told in one line where they cannot."""

import numpy as np
import pytest
from networks import dense, rows

import retrain
from retrain.data.labels import class_labels
from retrain.report.terminal import summary
from retrain.report.training import training_summary

CLASSES = np.arange(40) % 3
ONE_HOT = np.eye(3)[CLASSES]

READ = {
    "numbers": (CLASSES, ""),
    "small numbers": (CLASSES.astype(np.uint8), ""),
    "floats": (CLASSES.astype(np.float32), "float32 read as whole numbers"),
    "half floats": (CLASSES.astype(np.float16), "float16 read as whole numbers"),
    "a column": (CLASSES[:, None], "a column of shape (40, 1)"),
    "a column of floats": (
        CLASSES[:, None] + 0.0,
        "a column of shape (40, 1), float64 read as whole numbers",
    ),
    "a deep column": (CLASSES[:, None, None], "a column of shape (40, 1, 1)"),
    "one-hot": (ONE_HOT, "one-hot rows of 3"),
    "one-hot numbers": (ONE_HOT.astype(np.int8), "one-hot rows of 3"),
    "one-hot, true": (ONE_HOT.astype(bool), "one-hot rows of 3"),
}


@pytest.mark.parametrize("name", READ)
def test_what_means_one_thing_is_read(name):
    y, note = READ[name]
    found = class_labels(y, (3,))
    np.testing.assert_array_equal(found.classes, CLASSES)
    assert (found.note, found.reason, found.classes.dtype) == (note, "", np.int64)


def test_true_and_false():
    found = class_labels(CLASSES == 1, (2,))
    np.testing.assert_array_equal(found.classes, CLASSES == 1)
    assert found.note == "true and false as classes 1 and 0"
    column = class_labels((CLASSES == 1)[:, None], (2,))
    np.testing.assert_array_equal(column.classes, CLASSES == 1)


TWO_ONES = ONE_HOT.copy()
TWO_ONES[7] = 1
TOLD = {
    "none": (None, (3,), "the data has no labels"),
    "from 1": (CLASSES + 1, (3,), "the labels are 1 to 3; .* begin at 1; subtract 1 from them"),
    "floats from 1": (CLASSES + 1.0, (3,), "begin at 1; subtract 1"),
    "negative": (CLASSES - 1, (3,), "the labels are -1 to 1; 3 outputs want labels from 0 to 2"),
    "too many": (CLASSES, (2,), "the labels are 0 to 2; 2 outputs want labels from 0 to 1"),
    "halves": (CLASSES + 0.5, (3,), "float64, are not whole numbers; they are taken for targets"),
    "rows": (ONE_HOT * 0.7, (3,), r"of shape \(40, 3\), are no one-hot rows .* for targets"),
    "two ones": (TWO_ONES, (3,), "are no one-hot rows"),
    "no one": (ONE_HOT * 0, (3,), "are no one-hot rows"),
    "other rows": (ONE_HOT, (4,), "are one-hot rows of 3, and the network has 4 outputs"),
    "images": (np.zeros((40, 2, 2)), (3,), "neither one number for each sample nor one-hot rows"),
    "one output": (CLASSES, (1,), r"outputs, of shape \(1,\) per sample, are not one for each"),
    "maps": (CLASSES, (3, 4, 4), r"outputs, of shape \(3, 4, 4\) per sample"),
    "huge": (CLASSES + 1e300, (3,), "too large for class numbers"),
    "huge whole": (CLASSES.astype(np.uint64) + np.uint64(2**63), (3,), "too large"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_does_not_is_told(name):
    y, outputs, text = TOLD[name]
    found = class_labels(y, outputs)
    assert found.classes is None and found.note == ""
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(found.reason)
    assert "\n" not in found.reason


# --- runs ---------------------------------------------------------------------------------------

X = rows(40, 6)


def network(outputs=3):
    return dense(6, 8, outputs)


@pytest.mark.parametrize("name", READ)
def test_accuracy_fine_tuning_and_drop_take_them(name):
    y, note = READ[name]
    wanted = retrain.net_trim(network(), (X, CLASSES), fine_tune=1, evaluate=(X, CLASSES))
    found = retrain.net_trim(network(), (X, y), fine_tune=1, evaluate=(X, y))
    for part, accuracy in wanted.record["accuracy"].items():
        assert found.record["accuracy"][part].pop("labels", "") == note
        assert found.record["accuracy"][part] == accuracy
        assert all(value is not None for value in accuracy.values())
    run = retrain.lobs(network(), (X, y), sparsity=0.5)
    lines = summary(run.record, run.layers, {})
    assert any("accuracy on the calibration data" in line for line in lines)
    assert any(line.endswith(f": {note}") for line in lines) == bool(note)
    search = retrain.net_trim(
        network(), X, evaluate=(X, y), max_drop=50, max_trials=1, accept_inexact=True
    )
    assert search.record["search"]["got"]["drop"] is not None


@pytest.mark.parametrize("name", [name for name in TOLD if name not in ("maps", "images")])
def test_no_accuracy_disappears_without_a_word(name):
    y, outputs, text = TOLD[name]
    data = X if y is None else (X, y)
    run = retrain.lobs(network(*outputs), data, sparsity=0.5)
    (line,) = [line for line in summary(run.record, run.layers, {}) if "accuracy" in line]
    assert line.startswith("no accuracy on the calibration data: ")
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(line)
    assert run.record["accuracy"]["calibration"]["before"] is None
    with pytest.raises(ValueError, match=r"^fine_tune: wants"):
        retrain.lobs(network(*outputs), data, sparsity=0.5, fine_tune=1)
    with pytest.raises(ValueError, match=r"^max_drop: wants held-out data"):
        retrain.net_trim(network(*outputs), X, evaluate=data, max_drop=1.0)


def tables(loss="cross-entropy"):
    return {
        "data": {},
        "model": {"architecture": "dense", "widths": [6, 8, 3]},
        "training": {"epochs": 1, "loss": loss},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }


@pytest.mark.parametrize("name", READ)
def test_training_takes_them(name):
    y, note = READ[name]
    wanted = retrain.train(tables(), data=(X, CLASSES), test=(X, CLASSES))
    found = retrain.train(tables(), data=(X, y), test=(X, y))
    assert found.test_accuracy == wanted.test_accuracy
    assert found.record["train"].get("labels", "") == note
    assert any(note and note in line for line in training_summary(found.record)) == bool(note)


def test_training_tells_what_it_cannot_read():
    with pytest.raises(ValueError, match=r"labels are 1 to 3; .* begin at 1; subtract 1"):
        retrain.train(tables(), data=(X, CLASSES + 1))
    with pytest.raises(ValueError, match=r"a class number for each sample .* no one-hot rows"):
        retrain.train(tables(), data=(X, TWO_ONES))
    run = retrain.train(tables("mse"), data=(X, ONE_HOT))
    assert run.record["train"]["reason"] == "the loss has targets, not classes"
    lines = training_summary(run.record)
    assert any(line.endswith("no accuracy: the loss has targets, not classes") for line in lines)
