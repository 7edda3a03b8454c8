"""What a training run says on the terminal, word for word."""

from retrain.report.training import epoch_line, training_summary

LINE = {
    "epoch": 3,
    "loss": 0.12345,
    "accuracy": 0.98765,
    "test_loss": 0.2,
    "test_accuracy": 0.97,
    "parameters": 89610,
    "parameters_pruned": 0.4742,
    "operations": 178_000,
    "load": 50,
    "dense_load": 100,
    "seconds": 3.21,
}
RECORD = {
    "train": {"accuracy": 0.99, "loss": 0.05, "samples": 60000},
    "test": {"accuracy": None, "loss": None, "samples": 10},
    "cost": {
        "dense": {"parameters": 170410, "forward": 338_800},
        "final": {"parameters": 89610, "forward": 178_800},
    },
    "weights": {"count": 89000, "zeros": 890},
    "parameters_pruned": 0.47415,
    "operations_pruned": 0.4723,
    "load": 6e12,
    "dense_load": 1e13,
    "epochs": 60,
    "seconds": 200.04,
    "model": {"reason": ""},
}


def test_an_epoch():
    assert epoch_line(LINE, 60) == (
        "epoch 3/60: loss 0.1235, accuracy 98.77 %, test 97.00 %, 89,610 parameters "
        "(47.4 % pruned), 178 kflop a sample, load 50.0 % of dense, 3.2 s"
    )


def test_an_epoch_of_a_regression_that_is_not_pruned():
    line = LINE | {"accuracy": None, "test_accuracy": None, "parameters_pruned": 0.0, "load": 100}
    assert epoch_line(line | {"loss": None}, 9) == (
        "epoch 3/9: loss not finite, test loss 0.2000, 89,610 parameters, 178 kflop a sample, 3.2 s"
    )
    assert "test" not in epoch_line(line | {"test_loss": None}, 9)


def test_the_end():
    assert training_summary(RECORD) == [
        "training data (60,000 samples): accuracy 99.00 %, loss 0.0500",
        "test data (10 samples): loss not finite",
        "89,610 of 170,410 parameters left (pPR 47.41 %)",
        "890 of the 89,000 weights left are zero (1.00 %)",
        "178.8 kflop of 338.8 kflop a sample left (fPR 47.23 %)",
        "training load 6e+12 operations in 60 epochs, 60.0 % of the dense network's; 200.0 s",
    ]


def test_the_end_of_nothing():
    empty = {"test": None, "weights": {"count": 5, "zeros": 0}, "dense_load": 0, "load": 0}
    lines = training_summary({**RECORD, **empty, "model": {"reason": "it is odd"}})
    assert lines[-1] == "to load it, pass the architecture: it is odd"
    assert len(lines) == 4


def test_one_epoch():
    assert "in 1 epoch, 60.0 %" in training_summary({**RECORD, "epochs": 1})[-1]
