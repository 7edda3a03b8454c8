"""The bench of the multiobjective paper on a few random images: it runs, resumes and draws."""

import numpy as np
import pytest

from bench.papers import itp, itp_rows, itp_table
from bench.papers.itp_table import AFTER, BATCH, EPOCH, SIZES, TABLES, TRADE_OFFS


def images():
    generator = np.random.default_rng(0)
    y = np.arange(64) % 10
    x = 0.3 * generator.random((64, 1, 28, 28), dtype=np.float32)
    x[np.arange(64), 0, 2 * y, 2 * y] += 1  # something to learn
    return x, y


def test_all_parts_run_and_a_second_time_only_read(tmp_path, monkeypatch, capsys):
    source = f"{__name__}:images"
    for module in (itp, itp_rows):
        monkeypatch.setattr(module, "TRADE_OFFS", (0.0, 3e-4))
        monkeypatch.setattr(module, "TABLES", {key: rows[:2] for key, rows in TABLES.items()})
    options = ["--data", source, "--test", source, "--out", str(tmp_path), "--epochs", "1"]
    options += ["--full-epochs", "2", "--descent-epochs", "2", "--budget", "3", "--seeds", "2"]
    options += ["--search-epochs", "1"]
    assert itp.main(options) == 0
    told = capsys.readouterr().out
    for words in (
        "batchwise (c), Setting(epochs=1, schedule='drop', seed=1) (the paper: 30 epochs)",
        "2 epochs (the paper: 30), rate: drop",
        "batchwise (c): zero ",
        "batch prunes more than epoch: by ",
        "batch leaves fewer weights than epoch: ",
        "MAdam, 2 epochs",
        "SMGD, 2 epochs",
        "bisection: 3 trainings",
        "stochastic dichotomic: 3 trainings",
        "knee by chord: no knee",
        "at the knees of bisection, 2 epochs",
    ):
        assert words in told
    for name in ("figures-7-8.png", "figure-9.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def forbidden(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr("retrain.runs.training.fit", forbidden)
    assert itp.main(options) == 0
    assert capsys.readouterr().out == told


def test_a_training_that_diverges_is_a_row(tmp_path, capsys):
    x, y = images()
    data = itp_rows.Data(x, y, "images")
    bench = itp_rows.Bench(data, data, tmp_path)
    changes = {"optimizer.name": "sgd", "optimizer.lr": 1e30, "training.epochs": 1}
    row = bench.row("diverging", "itp-mnist", changes)
    assert row.status.startswith("diverged: the ") and np.isnan(row.zero)
    itp_rows.print_row(0.1, row)
    assert "diverged: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "share"), [(AFTER, 0.93), (EPOCH, 0.93), (BATCH, 0.96)], ids=["a", "b", "c"]
)
def test_the_printed_tables_say_what_the_text_does(table, share):
    """Section 6.2.1: at the critical trade-off about 96 % are pruned, and about 93 %."""
    row = table[TRADE_OFFS.index(itp_table.CRITICAL)]
    assert row.zero == pytest.approx(share, abs=0.007)
    assert sum(SIZES) == 58_920 and table[0].zero < 0.03
    assert all(n <= size for r in table for n, size in zip(r.nonzero, SIZES, strict=True))


def test_wins_leave_out_collapsed_networks():
    assert itp_rows.wins([(1, 2), (3, 3), (0, 5), (4, 0), (5, 4)]) == "1 of 3"
