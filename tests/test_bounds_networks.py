"""Bounds of torch networks, held against the deviation recomputed in long double."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import dense, rows
from torch import nn

import retrain
from bench.campaigns import bounds as campaign
from bench.campaigns.networks import Net, Plan, draw, exactly
from retrain.adapters.network import gain as gain_rules
from retrain.adapters.network import stream as torch_stream
from retrain.adapters.network.capture import name_of
from retrain.adapters.network.stream import TorchStream
from retrain.bounds import outputs as bounds
from retrain.report.terminal import bound_line, theorem_line


def network(*operations, shape=(6,), dtype=torch.float64, **modules):
    plan = Plan(shape, list(operations), modules)
    torch.manual_seed(1)
    return Net(plan).eval().requires_grad_(False).to(dtype)


def samples(rows=40, shape=(6,), seed=0):
    return np.random.default_rng(seed).standard_normal((rows, *shape))


def exact_deviation(before, after, x):
    moved = exactly(after, x) - exactly(before, x)
    return float(np.sqrt((moved * moved).sum()))


def holds(before, run, x):
    """Every bound of a run is at least the measured and the exact deviation."""
    found = run.bounds["calibration"]
    exact = exact_deviation(before, run.model, x)
    known = [value for value in (found.bound, found.direct) if value is not None]
    assert known, found
    assert min(known) >= max(found.measured, exact), (found, exact)
    assert found.defect is None and (found.ratio is None or found.ratio >= 1)
    return found, exact


def two_heads(join):
    deep = [("layer", "c"), ("relu",), ("layer", "b")]
    return network(
        (join, [("layer", "a")], deep), a=nn.Linear(6, 3), b=nn.Linear(5, 3), c=nn.Linear(6, 5)
    )


@pytest.mark.parametrize(("join", "word"), [("cat", "cat"), ("add", "add")])
def test_an_output_that_two_layers_make_has_no_direct_bound(join, word):
    net, x = two_heads(join), samples()
    run = retrain.net_trim(net, x, relative_epsilon=0.2, accept_inexact=True)
    found, _ = holds(net, run, x)
    assert found.direct is None and word in found.direct_reason
    assert "no direct bound: the output passes through" in bound_line(found)


def test_a_layer_that_the_output_does_not_use_costs_no_bound():
    plain = [("layer", "a"), ("relu",), ("layer", "b")]
    modules = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), "c": nn.Linear(3, 2)}
    net = network(*plain, ("unused", "c"), **modules)
    x = samples()
    found, exact = holds(net, retrain.net_trim(net, x, relative_epsilon=0.2), x)
    assert found.direct is not None
    assert found.direct == pytest.approx(exact, rel=0.02)


def test_reshaping_and_the_layers_own_activation_keep_the_direct_bound():
    plan = [("layer", "a"), ("relu",), ("layer", "b"), ("tanh",), ("flatten",)]
    net, x = network(*plan, a=nn.Linear(6, 8), b=nn.Linear(8, 3)), samples()
    found, _ = holds(net, retrain.net_trim(net, x, relative_epsilon=0.2), x)
    assert found.direct is not None and found.direct_reason is None


def test_a_convolution_can_be_the_last_layer():
    plan = [("layer", "a"), ("relu",), ("layer", "b"), ("flatten",)]
    modules = {"a": nn.Conv2d(2, 4, 3), "b": nn.Conv2d(4, 6, 2, stride=2, groups=2)}
    net, x = network(*plan, shape=(2, 6, 6), **modules), samples(20, (2, 6, 6))
    found, _ = holds(net, retrain.net_trim(net, x, relative_epsilon=0.2), x)
    assert found.direct is not None and found.direct < found.bound


@pytest.mark.parametrize("layers", ["a", "b"])
def test_one_layer_retrained(layers):
    net, x = (
        network(("layer", "a"), ("relu",), ("layer", "b"), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        samples(),
    )
    found, _ = holds(net, retrain.net_trim(net, x, relative_epsilon=0.2, layers=layers), x)
    if layers == "a":
        assert found.direct_reason == "b, whose response is the output, was not retrained"
    else:
        assert found.direct is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_epsilon_zero(seed, dtype):
    """The ball's violation is then relative to the targets, not to epsilon."""
    net = network(
        ("layer", "a"), ("relu",), ("layer", "b"), a=nn.Linear(6, 9), b=nn.Linear(9, 3), dtype=dtype
    )
    x = samples(seed=seed)
    run = retrain.net_trim(net, x, epsilon=0.0, accept_inexact=True, max_iterations=300)
    holds(net, run, x)
    if run.certified:
        assert run.bounds["calibration"].direct is not None


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_zero_targets(activation):
    last = nn.Linear(8, 3)
    net = network(
        ("layer", "a"),
        ("relu",),
        ("layer", "b"),
        *[("relu",)] * (activation == "relu"),
        a=nn.Linear(6, 8),
        b=last,
    )
    last.weight.zero_()
    last.bias.fill_(-1.0 if activation == "relu" else 0.0)
    x = samples()
    run = retrain.net_trim(net, x, relative_epsilon=0.1, accept_inexact=True)
    holds(net, run, x)


@pytest.mark.parametrize("power", [-24, -20, 20, 24])
def test_hidden_scales_whose_squares_float32_cannot_hold(power):
    first, last = nn.Linear(6, 8), nn.Linear(8, 3)
    net = network(("layer", "a"), ("relu",), ("layer", "b"), a=first, b=last, dtype=torch.float32)
    for tensor in (first.weight, first.bias):
        tensor *= 10.0**power
    last.weight *= 10.0**-power
    x = samples()
    run = retrain.net_trim(net, x, relative_epsilon=0.2, accept_inexact=True)
    for report in run.layers:
        assert np.isfinite(report.details.epsilon) and report.details.epsilon > 0
        assert np.isfinite(report.error)
    holds(net, run, x)


def cancelling(size, dtype):
    """Two hidden units nearly alike, read with opposite signs and a large factor."""
    first, last = nn.Linear(6, 8), nn.Linear(8, 3)
    net = network(("layer", "a"), ("relu",), ("layer", "b"), a=first, b=last, dtype=dtype)
    first.weight[1] = first.weight[0] * (1 + 1e-3)
    first.bias[:2] = 1.0
    last.weight[:, 0] = size
    last.weight[:, 1] = -size
    return net


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e4), (torch.float32, 1e6), (torch.float64, 1e13)]
)
@pytest.mark.parametrize("seed", range(4))
def test_hidden_units_that_cancel(seed, dtype, size):
    """The bound contains what the hidden layers' rounding becomes, not the outputs' alone."""
    net, x = cancelling(size, dtype), samples(seed=seed)
    stream = TorchStream(net, x)
    weight = stream.weight("b")
    weight[3, 0] = 0  # a small change, beside which rounding shows
    stream.commit("b", weight)
    found = bounds.output_bound(stream)
    exact = exact_deviation(net, stream.model, x)
    assert found.bound >= max(exact, found.measured)
    without = found.bound - found.rounding
    assert found.rounding > abs(exact - found.measured)
    assert found.rounding > 1e-6 * without


def test_without_the_allowance_for_rounding_bounds_are_broken(monkeypatch):
    """The test above can fail: measured float32 losses and float64's allowance are both needed."""

    def broken(dtype, size, units, *, allowed=True):
        count = 0
        for seed in range(8):
            net, x = cancelling(size, dtype), samples(seed=seed)
            stream = TorchStream(net, x)
            weight = stream.weight("b")
            weight[units, 0] *= 0.5
            stream.commit("b", weight)
            found = bounds.output_bound(stream)
            exact = exact_deviation(net, stream.model, x)
            bound = found.bound if allowed else found.bound - found.rounding
            count += bound < max(exact, found.measured)
        return count

    assert broken(torch.float32, 1e6, [0, 1]) == broken(torch.float64, 1e13, [3]) == 0
    assert broken(torch.float64, 1e13, [3], allowed=False) > 0
    monkeypatch.setattr(bounds, "widened", lambda bound, _: bound)
    assert broken(torch.float32, 1e6, [0, 1]) > 0


def test_convolutions_round_too():
    """A change that vanishes beside what a convolution's rounding does to the outputs."""
    conv, head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 36, 2)
    net = network(
        ("layer", "a"),
        ("relu",),
        ("flatten",),
        ("layer", "b"),
        shape=(2, 6, 6),
        a=conv,
        b=head,
        dtype=torch.float32,
    )
    conv.weight[1] = conv.weight[0] * (1 + 1e-3)
    conv.bias[:2] = 1.0
    head.weight[:, :36] = 1e5
    head.weight[:, 36:72] = -1e5
    x = samples(10, (2, 6, 6))
    stream = TorchStream(net, x)
    weight = stream.weight("b")
    weight[-2, 0] *= 0.5
    stream.commit("b", weight)
    found = bounds.output_bound(stream)
    assert found.bound >= max(exact_deviation(net, stream.model, x), found.measured)
    assert found.rounding > 0.1 * found.discrepancies["b"]


def test_an_intermediate_that_overflows_leaves_no_bound():
    first, middle, last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    net = network(
        ("layer", "a"),
        ("layer", "b"),
        ("relu",),
        ("layer", "c"),
        a=first,
        b=middle,
        c=last,
        dtype=torch.float32,
    )
    x = samples()
    stream = TorchStream(net, x)
    stream.commit("c", 0.5 * stream.weight("c"))
    assert bounds.output_bound(stream).bound is not None
    first.weight *= 1e25
    middle.weight.fill_(-1e25)  # -inf before the ReLU, 0 behind it: the output is finite
    middle.bias.zero_()
    first.weight.abs_()
    first.bias.zero_()
    stream = TorchStream(net, np.abs(x))
    stream.commit("c", 0.5 * stream.weight("c"))
    found = bounds.output_bound(stream)
    assert np.isfinite(found.measured)
    assert found.bound is None and "overflows" in found.reason
    record = found.to_json()
    assert record["bound"] is None and record["reason"] == found.reason


def test_prelu_has_a_factor():
    for slopes, factor in ((torch.tensor([0.25]), 1.0), (torch.tensor([-3.0, 0.5] * 4), 3.0)):
        act = nn.PReLU(len(slopes))
        act.weight.data = slopes
        net = network(
            ("layer", "a"),
            ("layer", "act"),
            ("layer", "b"),
            a=nn.Linear(6, 8),
            act=act,
            b=nn.Linear(8, 3),
        )
        stream = TorchStream(net, samples())
        last = torch.linalg.matrix_norm(net.b.weight, 2).item()
        assert stream.gain("a").value == pytest.approx(factor * last)
        holds(net, retrain.net_trim(net, samples(), relative_epsilon=0.2), samples())


def test_rounding_that_cannot_be_followed_is_no_bound_and_says_why():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    run = retrain.net_trim(Normed(), samples(), layers="b", relative_epsilon=0.2)
    found = run.bounds["calibration"]
    assert found.best is None
    for reason in (found.reason, found.direct_reason):
        assert "cannot be followed to the output: LayerNorm (norm)" in reason
    assert "no bound: " in bound_line(found)


def test_a_response_that_is_overwritten_is_not_the_output():
    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(6, 3)

        def forward(self, x):
            out = self.b(torch.relu(self.a(x)))
            seen = out.view(-1, 3)
            seen += self.c(x)
            return out

    stream = TorchStream(Overwritten().double(), samples())
    name, reason = stream.output_layer()
    assert name is None and reason == "the output passes through add"


def test_a_graph_that_is_not_what_the_network_computes_gives_no_bound():
    class Shifty(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            Shifty.calls += 1
            return self.b(torch.relu(self.a(x))) * (2 if Shifty.calls > 99 else 1)

    stream = TorchStream(Shifty().double(), samples())  # traced while it is young
    stream.commit("b", 0.5 * stream.weight("b"))
    Shifty.calls = 100
    found = bounds.output_bound(stream)
    assert found.bound is None and "gives other outputs" in found.reason


def test_constants_that_tracing_folds_are_found():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)
            self.mask, self.shift = torch.ones(5), torch.zeros(5)

        def forward(self, x):
            return self.b(torch.relu(self.a(x) - (self.mask + self.shift)))

    net, x = Masked(), samples()
    run = retrain.net_trim(net, x, relative_epsilon=0.2)
    assert run.measured > 0


def test_a_network_under_autocast_is_retrained_and_has_no_bound():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(torch.relu(self.a(x))).float()

    run = retrain.net_trim(Mixed(), samples(), relative_epsilon=0.2)
    assert run.bound is None and run.bounds["calibration"].reason


def test_a_bound_below_what_was_measured_is_told_as_a_defect(tmp_path, monkeypatch, capsys):
    net, x = two_heads("add"), samples()
    healthy = retrain.net_trim(net, x, relative_epsilon=0.2)
    assert healthy.defects == []
    low = replace(healthy.bounds["calibration"], bound=1e-3)
    assert low.best is None and low.ratio is None
    assert "a defect of this package" in low.defect
    line = bound_line(low)
    assert "DEFECT" in line and "proven at most" not in line
    record = {"rows": 4, "measured": 1.0, "frobenius": 0.5, "spectral": 0.5, "defect": "broken"}
    assert "DEFECT: broken" in theorem_line(record)

    monkeypatch.setattr(bounds, "widened", lambda bound, _: 1e-3 * bound)
    run = retrain.net_trim(net, x, relative_epsilon=0.2, out=tmp_path / "run")
    assert run.defects and run.bound is None
    assert run.record["bounds"]["calibration"]["defect"] in run.defects
    loaded = retrain.load(tmp_path / "run", net)
    assert loaded.defects == run.defects

    from types import SimpleNamespace

    from retrain.cli.shared import NOT_CERTIFIED, conclude

    quiet = SimpleNamespace(json=False, quiet=False)
    assert conclude(run, quiet, "") == NOT_CERTIFIED
    assert "DEFECT" in capsys.readouterr().out


def test_second_order_bounds_are_checked_too(monkeypatch):
    from retrain.bounds import l_obs as deviations

    net, x = two_heads("add"), samples()
    run = retrain.lobs(net, x, sparsity=0.4, method="one-shot")
    assert run.record["theorems"]["calibration"]["defect"] is None
    monkeypatch.setattr(deviations, "widened", lambda bound, _: 1e-3 * bound)
    run = retrain.lobs(net, x, sparsity=0.4, method="one-shot")
    assert "theorem 3.2" in run.defects[0]
    monkeypatch.undo()
    monkeypatch.setattr(deviations, "spectral_norm", lambda _: 0.0)
    monkeypatch.setattr(deviations, "ROUNDOFF", 0.0)
    run = retrain.lobs(net, x, sparsity=0.4, method="one-shot")
    assert "theorem 5.1 of layer b" in run.defects[0]


def test_the_discrepancies_are_those_of_the_rows():
    """The passage measures on images what `discrepancy` measures on patches, group by group."""
    plan = [("layer", "a"), ("relu",), ("layer", "b"), ("relu",), ("flatten",), ("layer", "c")]
    modules = {
        "a": nn.Conv2d(2, 4, 3),
        "b": nn.Conv2d(4, 6, 2, stride=2, groups=2),
        "c": nn.Linear(24, 3),
    }
    net, x = network(*plan, shape=(2, 6, 6), **modules), samples(300, (2, 6, 6))
    stream = TorchStream(net, x)
    rng = np.random.default_rng(0)
    for spec in stream.layers:
        for group in range(spec.groups):
            weight = stream.weight(spec.name, group)
            kept = torch.as_tensor(rng.random(weight.shape) < 0.7)
            stream.commit(spec.name, weight * kept, group)
    found = stream.passage()
    assert list(found.discrepancies) == ["a", "b", "c"]
    for name, value in found.discrepancies.items():
        assert value == pytest.approx(bounds.discrepancy(stream, name), rel=1e-10)
    assert found.rows == 300


def test_the_long_double_form_is_the_networks():
    """The campaign's own evaluation, against torch in float64."""
    for seed in range(25):
        net, x, traits = draw(np.random.default_rng(seed))
        if any(trait.startswith(("scale", "cancellation")) for trait in traits):
            continue
        net = net.double()
        theirs = net(torch.as_tensor(x)).numpy()
        np.testing.assert_allclose(exactly(net, x).astype(float), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("block", range(4))
def test_the_short_campaign_finds_no_bound_too_low(block):
    rows = [campaign.case(10_000 + 8 * block + k) for k in range(8)]
    assert [row["violations"] for row in rows] == [[]] * 8
    assert any(row.get("sum") for row in rows)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_campaign_finds_what_is_broken(monkeypatch):
    """Without rounding, or with a direct bound whatever makes the output, cases are violated."""
    assert campaign.case(29)["violations"] == campaign.case(12)["violations"] == []

    def last(plan):
        return [node for node in plan.nodes if name_of(node) == "linear"][-1], ""

    with monkeypatch.context() as patch:
        patch.setattr(torch_stream, "output_source", last)
        assert campaign.case(29)["violations"]
    with monkeypatch.context() as patch:
        patch.setattr(bounds, "widened", lambda bound, _: bound)
        assert campaign.case(12)["violations"]
    with monkeypatch.context() as patch:
        patch.setitem(gain_rules.RULES, "relu", 0.1)
        assert any(campaign.case(seed)["violations"] for seed in range(40, 60))
    with pytest.raises(SystemExit):
        campaign.main(["--help"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"relative_epsilon": 0.05}])
def test_half_types_are_measured_and_bounded_as_they_compute(dtype, options):
    """In half types a network's own rounding is larger than what an exact fit leaves."""
    model = dense(8, 6, 4, dtype=dtype)
    x = rows(60, 8)
    run = retrain.net_trim(model, x, **options)
    samples = torch.tensor(x, dtype=dtype)
    with torch.no_grad():
        moved = (run.model(samples).double() - model(samples).double()).norm().item()
    assert run.measured == pytest.approx(moved, rel=1e-6)
    assert run.bound >= moved
    wide = [copy.deepcopy(net).double()(torch.tensor(x).double()) for net in (run.model, model)]
    assert run.bound >= (wide[0] - wide[1]).norm().item()


def test_adding_a_constant_keeps_the_bound():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)
            self.shift = nn.Parameter(100 * torch.ones(6))

        def forward(self, x):
            return self.last(self.first(x).relu() + self.shift)

    torch.manual_seed(0)
    x = rows(60, 8)
    run = retrain.net_trim(Net(), x, relative_epsilon=0.1)
    assert run.bound is not None and run.bound >= run.measured


def test_weights_beyond_the_type_on_the_way_end_in_a_status():
    """Hidden values of 1e-24 beside a bias: a step may lead beyond float32's largest number."""
    model = dense(8, 6, 4)
    with torch.no_grad():
        model[0].weight *= 1e-24
        model[0].bias *= 1e-24
        model[2].weight *= 1e24
    x = rows(60, 8)
    run = retrain.net_trim(model, x, relative_epsilon=0.1)
    assert run.bound >= run.measured
    assert run.layers[0].certified
    for weight in run.model.parameters():
        assert torch.isfinite(weight).all()
