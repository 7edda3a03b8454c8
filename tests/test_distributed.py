"""Several processes under torchrun take the steps of one; batch norm over all is torch's."""

import os
from pathlib import Path

import ends_badly
import pytest
import torch
from joint_runs import recipes, run_all
from torch import nn
from torchrun import torchrun
from training_cases import same_runs, save_data, toml

import retrain
from retrain.trainers.loop.batches import Augmentation, Part, parts
from retrain.trainers.loop.distributed import join_batch_norms, part_batch_norms

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One process's runs in `alone`, two processes' in `together`."""
    here = tmp_path_factory.mktemp("joint")
    save_data(here)
    before = Path.cwd()
    os.chdir(here)
    try:
        run_all(here / "alone")
    finally:
        os.chdir(before)
    torchrun(HERE / "joint_runs.py", "together", folder=here)
    (here / "r.toml").write_text(toml(recipes()["plain"]))
    command = ["-m", "retrain", "train", "r.toml", "--out", "by command", "--threads", "1"]
    done = torchrun(*command, folder=here)
    assert done.stdout.count("written to by command") == 1
    return here


def numbers(value):
    """Numbers of nested JSON, in order."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in numbers(value[key])]
    if isinstance(value, list):
        return [number for entry in value for number in numbers(entry)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("case", recipes())
def test_two_processes_are_one_with_the_joint_batch(folder, case):
    alone, together = (retrain.load(folder / who / case) for who in ("alone", "together"))
    assert together.record["identity"]["processes"] == 2
    for name, tensor in alone.model.state_dict().items():
        other = together.model.state_dict()[name]
        torch.testing.assert_close(other, tensor, rtol=1e-5, atol=1e-5, msg=name)
    for one, two in zip(alone.history, together.history, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["accuracy"] == one["accuracy"]
        assert (two["load"], two["parameters"]) == (one["load"], one["parameters"])
        assert numbers(two["method"]) == pytest.approx(numbers(one["method"]), rel=1e-4, abs=1e-5)


def test_the_command_under_torchrun_is_the_same_run(folder):
    weights = [folder / run / "model.safetensors" for run in ("together/plain", "by command")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_stopped_before_and_after_a_block_left_two_processes_resume_to_the_same(folder):
    same_runs(folder / "together" / "shrinking", folder / "together" / "resumed")


def test_what_left_the_network_left_it_in_both(folder):
    run = retrain.load(folder / "together" / "shrinking")
    assert [line["method"]["blocks"] for line in run.history] == [3, 3, 2, 2, 2, 2]
    assert len(list(run.model.parameters())) == 8


@pytest.mark.parametrize("how, code", [("command", 2), ("uncaught", 1)])
def test_a_training_that_ends_badly_ends_with_its_own_error(folder, how, code):
    (folder / "bad.toml").write_text(toml(ends_badly.RECIPE))
    command = ["-m", "retrain", "train", "bad.toml", "--threads", "1", "--out"]
    start = {"command": command, "uncaught": [HERE / "ends_badly.py"]}[how]
    done = torchrun(*start, f"bad by {how}", folder=folder, code=1, seconds=100)
    # The first process to end is seen whole; torchrun then ends the other, done or not.
    assert "no number came out" in done.stderr
    assert f"(exitcode: {code})" in done.stderr
    assert "let go" in done.stdout
    for sign in ("terminate called", "Fatal Python error", "SIGABRT"):
        assert sign not in done.stderr


def test_only_the_first_process_writes(folder):
    names = {path.name for path in (folder / "together" / "plain").iterdir()}
    assert names == {"lock", "run.json", "history.jsonl", "checkpoint.pt", "model.safetensors"}
    assert not (folder / "together" / "bad" / "checkpoint.pt").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_parts_make_up_the_whole(count, processes):
    every = [Part(rank, processes) for rank in range(processes)]
    held = [(part.of(count), part.share(count)) for part in every]
    rows = [row for own, share in held if share > 0 for row in range(count)[own]]
    assert rows == list(range(count))
    assert sum(share for _, share in held) == pytest.approx(1)
    for own, share in held:
        assert len(range(count)[own]) == max(round(share * count), 1)


def test_parts_of_arrays_and_of_batches_are_augmented_as_the_whole_is():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    shake = Augmentation(lambda count, g: torch.rand(count, 1, generator=g), lambda x, d: x + d)

    def drawn(part, data):
        generator = torch.Generator().manual_seed(1)
        return list(parts(data, 4, CPU, generator, part=part, augmentation=shake))

    for data in ((x, y), [(x[:6], y[:6]), (x[6:], y[6:]), (x[:0], y[:0])]):
        whole = drawn(Part(), data)
        split = [drawn(Part(rank, 2), data) for rank in range(2)]
        for batch, one, two in zip(whole, *split, strict=True):
            assert torch.equal(torch.cat([one.inputs, two.inputs]), batch.inputs)
            assert torch.equal(torch.cat([one.targets, two.targets]), batch.targets)
            assert one.samples == batch.samples == len(batch.targets)
    with pytest.raises(ValueError, match="generator: an augmentation wants one"):
        list(parts((x, y), 4, CPU, augmentation=shake))


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (4, 3, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
def test_joint_batch_norm_is_torchs_in_one_process(alone, shape, options):
    layer = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    own, torchs = (nn.Sequential(layer(3, **options)) for _ in range(2))
    assert join_batch_norms(own)
    assert isinstance(own[0], layer)
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        results = []
        for model in (own, torchs):
            inputs = x.clone().requires_grad_()
            model.zero_grad()
            (model(inputs) ** 3).sum().backward()
            grads = [parameter.grad for parameter in model.parameters()]
            results.append([inputs.grad, *grads, *model.state_dict().values()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    part_batch_norms(own)
    assert type(own[0]) is layer
    assert not join_batch_norms(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="BatchNorm3d cannot be trained in several processes"):
        join_batch_norms(nn.Sequential(nn.BatchNorm3d(2)))
