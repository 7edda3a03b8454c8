"""A command says what it does whenever it has said nothing for two seconds."""

import logging
import re
import time

import numpy as np
import pytest
from command import start
from small_case import save_case

from retrain.cli.status import REPEATED, SILENCE, Status


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(records, until, live=False, spoken=()):
    """What is shown when phases begin at some seconds, a tick every quarter of one."""
    clock, shown = Clock(), []
    status = Status(lambda line: shown.append((clock.now, line)), live=live, clock=clock)
    logger = logging.getLogger("retrain.test")
    for quarter in range(1, 4 * until + 1):
        clock.now = quarter / 4
        for second, text in records:
            if second == clock.now:
                status.emit(logger.makeRecord("retrain", logging.INFO, "", 0, text, (), None))
        if clock.now in spoken:
            status.spoken()
        status.tick()
    return shown


def test_a_phase_is_said_after_two_seconds_of_silence_and_again_with_its_age():
    shown = run([(1.0, "reading")], until=30)
    assert shown[0] == (SILENCE, "reading")
    assert shown[1] == (SILENCE + REPEATED, "reading, for 11 s")
    assert [line for _, line in shown[1:]] == ["reading, for 11 s", "reading, for 21 s"]


def test_phases_that_change_are_said_every_two_seconds_at_most():
    shown = run([(second / 4, f"batch {second}") for second in range(1, 120)], until=30)
    gaps = np.diff([0.0] + [second for second, _ in shown])
    assert gaps.max() <= SILENCE + 0.25
    assert gaps.min() >= SILENCE


def test_what_is_said_otherwise_counts_and_a_terminal_shows_every_change():
    assert run([(1.0, "a")], until=3, spoken=(1.75, 2.75)) == []
    shown = run([(1.0, "a"), (1.5, "b")], until=2, live=True)
    assert [line for _, line in shown] == ["starting: loading torch and the files", "a", "b"]


def test_loggers_are_as_before_and_warnings_go_on(caplog):
    logger = logging.getLogger("retrain")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with Status(lambda line: None):
        logging.getLogger("retrain.somewhere").warning("look out")
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    assert "look out" in caplog.text


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    save_case(folder, (16, 12, 8, 6))
    return folder


def slow():
    """Each pass for the bounds takes longer than a silence may last, as a large network's does."""
    import retrain.adapters.network.stream as stream

    measured = stream.TorchStream.passage

    def passage(self):
        time.sleep(SILENCE + 1)
        return measured(self)

    stream.TorchStream.passage = passage


def watch(running):
    """Seconds at which stderr grew, until the end."""
    grew, size = [time.monotonic()], 0
    while running.running:
        now = len(running.read().err)
        if now != size:
            grew.append(time.monotonic())
            size = now
        time.sleep(0.05)
    return [*grew, time.monotonic()]


@pytest.mark.parametrize("verb", [("trim",), ("lobs", "--sparsity", 0.5)])
def test_the_bounds_of_a_slow_network_are_not_silent(case, verb, tmp_path):
    common = ("net.pth", "--data", "data.npz", "--evaluate", "test.npz", "--out", tmp_path / "out")
    running = start(case, verb[0], *common, *verb[1:], prepare=slow)
    quiet = start(case, verb[0], *common[:-1], tmp_path / "q", *verb[1:], "--quiet", prepare=slow)
    spoken = watch(running)
    answer = running.wait()
    assert len(spoken) > 3  # it spoke while it was running
    assert answer.code == 0
    assert "bounds: calibration data" in answer.err
    assert "bounds: held-out data" in answer.err
    answer = quiet.wait()
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_a_fast_run_says_its_layers_only(case, tmp_path):
    answer = start(case, "trim", "net.pth", "--data", "data.npz", "--out", tmp_path / "out").wait()
    said = [line for line in answer.err.splitlines() if not re.match(r"\d: ", line)]
    assert len(said) <= 2
