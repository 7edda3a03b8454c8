"""What the terminal says: tables, verdicts, and lines that a person can act on."""

import io
import math
import re
from dataclasses import fields, replace

import pytest
from rich.console import Console

from retrain.bounds.outputs import OutputBound
from retrain.report.terminal import bound_line, output, run_table, summary, verdict
from retrain.stream.details import NetTrimDetails
from retrain.stream.layer_report import LayerReport
from solvers.result import Status

UNUSED = {
    entry.name
    for entry in fields(NetTrimDetails)
    if "None" in entry.type and entry.name != "relative_epsilon"
}
REPORT = LayerReport(
    name="fc1",
    kind="linear",
    shape=(300, 100),
    follows="relu",
    method="net-trim",
    weights=30_000,
    zeros_before=0,
    zeros=21_000,
    rows=500,
    total_rows=500,
    status=Status.SOLVED,
    certified=True,
    dense_units=0,
    error=1.5,
    relative_error=0.0499,
    seconds=2.25,
    details=NetTrimDetails(
        scheme="cascade",
        form="constrained",
        epsilon=1.5,
        gap=1.2e-3,
        ball_violation=0.0,
        ceiling_violation=4e-4,
        relative_epsilon=0.05,
        **dict.fromkeys(UNUSED),
    ),
)
SHORT = replace(REPORT, status=Status.ITERATION_LIMIT, certified=False)
BOUND = OutputBound(
    rows=500,
    measured=2.0,
    relative=0.05,
    bound=6.0,
    rounding=0.0,
    direct=2.5,
    reason=None,
    discrepancies={"fc1": 1.5},
    gains={"fc1": 4.0},
)


def record(*reports, **changes):
    return {
        "totals": {
            "weights": sum(report.weights for report in reports),
            "zeros": sum(report.zeros for report in reports),
            "zeros_before": 0,
            "sparsity": 0.7,
            "certified": all(report.certified for report in reports),
        },
        "accuracy": {"calibration": {"before": 0.9, "after": 0.89}},
        "left": [],
        "layers": [report.to_json() for report in reports],
        **changes,
    }


def summarised(reports, bounds=None, **changes):
    return summary(record(*reports, **changes), reports, bounds or {})


def shown(renderable, width=120):
    page = io.StringIO()
    Console(file=page, width=width).print(renderable)
    return page.getvalue()


def test_the_table_has_a_row_a_layer_with_the_worse_violation():
    lines = [line for line in shown(run_table([REPORT, SHORT])).splitlines() if "fc1" in line]
    assert len(lines) == 2
    for cell in ("300 x 100", "70.0 %", "0.0499", "0.0500", "1.2e-03", "4.0e-04", "2.2"):
        assert cell in lines[0]
    assert re.search(r"\bcertified\b", lines[0])
    assert "not certified" in lines[1]


def test_the_table_fits_a_narrow_terminal_with_every_number_whole():
    large = replace(REPORT, name="features", shape=(9216, 4096), seconds=123.4)
    text = shown(run_table([large, SHORT]), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    row = next(line for line in text.splitlines() if "features" in line)
    for cell in ("9216 x 4096", "0.0499", "0.0500", "1.2e-03", "4.0e-04", "123.4", "certified"):
        assert cell in row


def test_numbers_that_are_none_are_left_out():
    """Of a layer whose solve broke down, or of a target that is zero."""
    nothing = dict.fromkeys(("epsilon", "gap", "ball_violation", "ceiling_violation"), math.nan)
    details = replace(SHORT.details, relative_epsilon=None, **nothing)
    broken = replace(SHORT, status=Status.NUMERICAL_ERROR, details=details, error=math.nan)
    assert "numerical error" in shown(run_table([broken]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"certified": True}, "certified"),
        ({"dense_units": 100}, "not certified (iteration limit), dense weights kept"),
        (
            {"dense_units": 3},
            "not certified (iteration limit), dense weights kept in 3 of 100 units",
        ),
        ({"dense_units": 0}, "not certified (iteration limit), used as it is"),
    ],
)
def test_verdicts(changes, said):
    assert verdict(replace(SHORT, **changes)) == said


def test_the_summary_counts_and_compares():
    lines = summarised([REPORT], {"calibration": BOUND, "held_out": replace(BOUND, rows=90)})
    assert lines == [
        "21,000 of 30,000 weights are zero (70.0 %; 0.0 % before)",
        "accuracy on the calibration data: 90.00 % before, 89.00 % after",
        "outputs on the calibration data (500 rows): " + bound_line(BOUND),
        "outputs on held-out data (90 rows): " + bound_line(BOUND),
    ]


def test_the_summary_leaves_out_accuracies_that_there_are_none_of():
    nothing = {"calibration": {"before": None, "after": None}}
    lines = summarised([REPORT], accuracy=nothing)
    assert len(lines) == 1


def test_the_summary_names_fine_tuning_layers_left_and_samples_of_rows():
    accuracy = {"calibration": {"before": 0.9, "after": 0.8, "fine_tuned": 0.95}}
    left = [{"name": "conv", "kind": "Conv1d", "reason": "of a kind that cannot be retrained"}]
    sampled = replace(REPORT, rows=400)
    text = "\n".join(summarised([sampled], accuracy=accuracy, left=left))
    assert "80.00 % after, 95.00 % fine-tuned" in text
    assert "left as it was: conv (Conv1d): of a kind that cannot be retrained" in text
    assert "seeded sample of 400 of 500 rows (--memory)" in text


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.SOLVED])
def test_every_failure_has_a_remedy_in_the_command_s_words(status):
    last = summarised([replace(SHORT, status=status)])[-1]
    assert last.startswith(f"not certified: {status.value}; ")
    assert "warm_start" not in last
    assert "max_iterations" not in last


def test_bounds_say_what_is_proven_and_how_tight():
    assert bound_line(BOUND) == (
        "moved by 2 (5.00 % of their norm), proven at most 2.5 directly, 6 as a sum over layers; "
        "best bound / measured = 1.25"
    )
    assert "directly" not in bound_line(replace(BOUND, direct=None))
    none = replace(BOUND, bound=None, direct=None, reason="an attention block has no finite gain")
    assert bound_line(none).endswith("no bound: an attention block has no finite gain")


def test_output_has_a_width_where_there_is_no_terminal(capsys):
    assert output().width == 120
    output().print("x" * 121)
    assert capsys.readouterr().out.splitlines()[0] == "x" * 120
