"""The command line as a stranger meets it: bad input, exit codes, what goes to which stream."""

import contextlib
import inspect
import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import command
from networks import dense, rows
from safetensors.torch import load_file, save_file
from small_case import WIDTHS, network, samples, save_case

import retrain
from retrain.cli import main
from retrain.methods.lobs.options import LobsOptions
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.runs.directory import read_record

MARK = "ran"


class Bomb:
    """Pickles as a call that leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path(MARK),)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_case(folder)
    state = network().state_dict()
    (folder / "cut.safetensors").write_bytes((folder / "net.safetensors").read_bytes()[:-100])
    (folder / "cut.pth").write_bytes((folder / "net.pth").read_bytes()[:900])
    (folder / "text.pth").write_text("hello")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "program.pt2").write_bytes(b"PK")
    torch.save({"w": Bomb()}, folder / "bomb.pth")
    torch.save(network(), folder / "module.pt")
    torch.save({"epoch": 3}, folder / "numbers.pth")
    save_file({"a": torch.zeros(3, 3, 3)}, folder / "cube.safetensors")
    wrong = {**state, "2.weight": torch.zeros(8, 5)}
    save_file(wrong, folder / "nochain.safetensors")
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        broken = {key: tensor.clone() for key, tensor in state.items()}
        broken["2.weight"][1, 2] = value
        save_file(broken, folder / f"{name}.safetensors")
    x, y = samples()
    np.savez(folder / "unlabelled.npz", x=x)
    np.savez(folder / "real.npz", x=x, y=y + 0.5)
    np.savez(folder / "many.npz", x=x, y=y + 3)
    np.savez(folder / "wide.npz", x=np.ones((9, WIDTHS[0] + 1), np.float32))
    np.savez(folder / "none.npz", x=x[:0])
    np.savez(folder / "objects.npz", x=np.array([Bomb()]))
    (folder / "cut.npz").write_bytes((folder / "data.npz").read_bytes()[:-300])
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        broken = x.copy()
        broken[3, 3] = value
        np.savez(folder / f"{name}.npz", x=broken)
    (folder / "file").write_text("")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("mine")
    return folder


def trim(case, *arguments, model="net.safetensors", data="data.npz", out="out"):
    return command(case, "trim", model, "--data", data, "--out", out, *arguments)


BAD = {
    "no file": ({"model": "no.pth"}, (), "there is no file 'no.pth'"),
    "a folder": ({"model": "full"}, (), "'full' holds no run.json"),
    "other suffix": ({"model": "file"}, (), "of no known kind"),
    "truncated safetensors": ({"model": "cut.safetensors"}, (), "not a whole safetensors"),
    "empty safetensors": ({"model": "empty.safetensors"}, (), "not a whole safetensors"),
    "truncated state dict": ({"model": "cut.pth"}, (), "truncated"),
    "no tensors": ({"model": "text.pth"}, (), "truncated or not a file"),
    "numbers": ({"model": "numbers.pth"}, (), "not a tensor"),
    "pickled module": ({"model": "module.pt"}, (), "could run code"),
    "code": ({"model": "bomb.pth"}, (), "could run code"),
    "pt2": ({"model": "program.pt2"}, (), "--trust"),
    "broken pt2": ({"model": "program.pt2"}, ("--trust",), "model:"),
    "cube": ({"model": "cube.safetensors"}, (), "--arch"),
    "no chain": ({"model": "nochain.safetensors"}, (), "--arch"),
    "NaN weights": ({"model": "nan.safetensors"}, (), "'2.weight' has NaN or infinite"),
    "infinite weights": ({"model": "inf.safetensors"}, (), "'2.weight' has NaN or infinite"),
    "no data": ({"data": "no.npz"}, (), "there is no file 'no.npz'"),
    "unknown data": ({"data": "mnits"}, (), "want FILE.npz"),
    "wide data": ({"data": "wide.npz"}, (), "wants 16 inputs and got 17"),
    "NaN data": ({"data": "nan.npz"}, (), "NaN or infinite samples"),
    "infinite data": ({"data": "inf.npz"}, (), "NaN or infinite samples"),
    "empty data": ({"data": "none.npz"}, (), "is empty"),
    "pickled data": ({"data": "objects.npz"}, (), "pickled objects"),
    "truncated data": ({"data": "cut.npz"}, (), "data:"),
    "wide held-out": ({}, ("--evaluate", "wide.npz"), "wants 16 inputs and got 17"),
    "epsilon": ({}, ("--epsilon", "-1"), "epsilon: got -1.0, want a finite number >= 0"),
    "relative": ({}, ("--relative-epsilon", "nan"), "relative_epsilon: got nan, want a finite"),
    "both": ({}, ("--epsilon", "1", "--relative-epsilon", "1"), "not allowed with"),
    "inflation": ({}, ("--inflation", "0.9"), "inflation: got 0.9, want a finite number >= 1"),
    "group": ({}, ("--penalty", "group", "--form", "regularised"), "couples the units"),
    "penalty": ({}, ("--penalty", "l2"), "got 'l2', want l1, elastic:RIDGE or group[:WEIGHT]"),
    "ridge": ({}, ("--penalty", "elastic:-1"), "ridge: got -1.0, want a positive"),
    "gap": ({}, ("--gap", "0"), "tolerance: got 0.0, want a positive finite number"),
    "violation": (
        {},
        ("--violation", "nan"),
        "violation_tolerance: got nan, want a positive finite number",
    ),
    "layers": ({}, ("--layers", "fc*"), "no layer matches 'fc*'; there are 0, 2, 4"),
    "skip": ({}, ("--skip", "9"), "skip: no layer matches '9'"),
    "skip all": ({}, ("--skip", "*"), "nothing is left to retrain"),
    "no labels": ({"data": "unlabelled.npz"}, ("--fine-tune", "1"), "wants labels"),
    "real labels": ({"data": "real.npz"}, ("--fine-tune", "1"), "class number"),
    "many labels": ({"data": "many.npz"}, ("--fine-tune", "1"), "labels from 0"),
    "epochs": ({}, ("--fine-tune", "-1"), "fine_tune: got -1, want a number of epochs >= 0"),
    "device": ({}, ("--device", "tpu"), "cannot compute on 'tpu'"),
    "meta": ({}, ("--device", "meta"), "cannot compute on 'meta'"),
    "cuda": ({}, ("--device", "cuda:77"), "cannot compute on 'cuda:77'"),
    "limit": ({}, ("--limit", "0"), "limit: got 0"),
    "limit text": ({}, ("--limit", "ten"), "invalid int value: 'ten'"),
    "normalise": ({}, ("--normalise", "1"), "normalise:"),
    "std": ({}, ("--normalise", "1,0"), "positive STDs"),
    "jobs": ({}, ("--jobs", "0"), "jobs: got 0, want a whole number >= 1"),
    "memory": ({}, ("--memory", "nan"), "memory: got nan, want a positive finite number"),
    "iterations": (
        {},
        ("--max-iterations", "0"),
        "max_iterations: got 0, want a whole number >= 1",
    ),
    "lambda": ({}, ("--fit-weight", "1"), "belongs to the regularised form"),
    "links": ({}, ("--link-normalised",), "set epsilon"),
    "arch": ({}, ("--arch", "nowhere:net"), "arch: 'nowhere:net'"),
    "activation": ({}, ("--activation", "step"), "activation: got 'step'"),
    "scheme": ({}, ("--scheme", "both"), "invalid choice: 'both'"),
    "below a file": ({"out": "file/run"}, (), "file"),
    "a file": ({"out": "file"}, (), "is a file"),
    "somebody's": ({"out": "full"}, (), "is not empty and holds no run (it has 'thesis.tex')"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_code_2_and_nothing_left(case, name):
    files, arguments, said = BAD[name]
    before = sorted(path.name for path in case.rglob("*"))
    answer = trim(case, *arguments, **files)
    assert said in answer.error()
    assert sorted(path.name for path in case.rglob("*")) == before
    assert not (case / MARK).exists()


def test_a_failure_inside_the_method_leaves_the_directory_free(case, tmp_path):
    """All-zero weights have no default fit weight, which is found out with the run open."""
    state = {key: torch.zeros_like(tensor) for key, tensor in network().state_dict().items()}
    save_file(state, tmp_path / "zero.safetensors")
    options = ("--form", "regularised")
    answer = trim(case, *options, model=tmp_path / "zero.safetensors", out=tmp_path / "out")
    assert "fit_weight: no default" in answer.error()
    assert not (tmp_path / "out").exists()


def test_usage_errors_are_one_line(case):
    for arguments in ((), ("trim",), ("prune",), ("trim", "net.pth"), ("layers",)):
        assert command(case, *arguments).error().startswith("retrain")


@pytest.fixture(scope="module")
def finished(case):
    """A finished run, its answer and its record."""
    answer = trim(case, "--evaluate", "test.npz", "--json", out="finished")
    return answer, read_record(case / "finished")


def test_json_is_the_record(finished):
    answer, record = finished
    assert answer.code == 0
    assert answer.err == ""
    printed = json.loads(answer.out, parse_constant=pytest.fail)
    assert printed == {key: value for key, value in record.items() if key != "format"}


def test_evaluate_adds_accuracies_and_bounds(finished):
    _, record = finished
    assert set(record["accuracy"]) == set(record["bounds"]) == {"calibration", "held_out"}
    assert record["held_out"] == {"name": "test.npz", "samples": 60}


def test_quiet_is_silent_and_repeats(case, finished):
    before = (case / "finished" / "model.safetensors").read_bytes()
    answer = trim(case, "--evaluate", "test.npz", "--quiet", out="finished")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    assert (case / "finished" / "model.safetensors").read_bytes() == before


def test_plain_lines_go_to_stderr_and_the_table_to_stdout(case, tmp_path):
    answer = trim(case, out=tmp_path / "out")
    assert answer.code == 0
    lines = answer.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["0", "2", "4"]
    assert all("certified" in line for line in lines)
    assert "\x1b" not in answer.err + answer.out
    for word in ("read as dense layers 16-12-8-6", "weights are zero", "proven at most", "written"):
        assert word in answer.out


def test_dry_run_writes_nothing(case):
    answer = trim(case, "--dry-run", "--layers", "2,4")
    assert answer.code == 0
    assert [line.partition(":")[0] for line in answer.out.splitlines()] == ["2", "4"]
    assert not (case / "out").exists()


def test_not_certified_is_code_1_with_the_way_out(case, tmp_path):
    answer = trim(case, "--max-iterations", "1", out=tmp_path / "out")
    assert answer.code == 1
    assert "--max-iterations" in answer.out
    assert "dense weights kept" in answer.err
    assert "Warning" not in answer.err
    saved = load_file(tmp_path / "out" / "model.safetensors")
    given = load_file(case / "net.safetensors")
    assert all(torch.equal(saved[name], given[name]) for name in given)


def test_layers_and_skip_leave_the_others_untouched(case, tmp_path):
    answer = trim(case, "--layers", "[02]", "--skip", "0", "--json", out=tmp_path / "out")
    record = json.loads(answer.out)
    assert [layer["name"] for layer in record["layers"]] == ["2"]
    assert [(left["name"], left["reason"]) for left in record["left"]] == [
        ("0", "not selected"),
        ("4", "not selected"),
    ]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    given = load_file(case / "net.safetensors")
    assert sorted(saved) == sorted(given)
    same = {name for name in given if torch.equal(saved[name], given[name])}
    assert same == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_state_dict_and_exported_program_come_in(case, tmp_path):
    module = network()
    shapes = ({0: torch.export.Dim("samples")},)
    program = torch.export.export(module, (torch.zeros(2, WIDTHS[0]),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "net.pt2")
    models = {}
    for model, options in ((case / "net.pth", ()), (tmp_path / "net.pt2", ("--trust",))):
        out = tmp_path / model.suffix
        answer = trim(case, "--quiet", *options, model=model, out=out)
        assert (answer.code, answer.err) == (0, "")
        models[model.suffix] = load_file(out / "model.safetensors")
    assert sorted(models[".pth"]) == sorted(module.state_dict())
    assert models[".pth"].keys() == models[".pt2"].keys()
    assert all(torch.equal(models[".pth"][name], models[".pt2"][name]) for name in models[".pth"])


def test_second_order_runs_share_the_run_directory_and_fine_tuning(case, tmp_path):
    arguments = ("--sparsity", "0.5", "--fine-tune", "1", "--out", tmp_path / "out", "--json")
    answer = command(case, "lobs", "net.pth", "--data", "data.npz", *arguments)
    assert (answer.code, answer.err) == (0, "")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    zeros = sum(int((saved[f"{name}.weight"] == 0).sum()) for name in (0, 2, 4))
    assert zeros == json.loads(answer.out)["totals"]["zeros"] > 0


def test_layers_lists_and_speaks_json(case):
    shown = command(case, "layers", "net.pth")
    assert shown.code == 0
    assert "16 x 12" in shown.out
    listed = json.loads(command(case, "layers", "net.pth", "--json").out)
    assert [layer["name"] for layer in listed["layers"]] == ["0", "2", "4"]
    assert command(case, "layers", "no.pth").error().endswith("there is no file 'no.pth'")


# --- fresh interpreters -----------------------------------------------------------------------


def fresh(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_help_is_fast_and_imports_neither_numpy_nor_torch():
    code = (
        "import sys\nfrom retrain.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'numpy', 'torch', 'rich', 'joblib'} & set(sys.modules)"
    )
    for arguments in (("--help",), ("trim", "--help"), ("layers", "--help"), ("demo", "--help")):
        answer = fresh("-c", code, *arguments)
        assert answer.returncode == 0, answer.stderr
        assert "usage: retrain" in answer.stdout
    times = []
    for _ in range(3):
        started = time.perf_counter()
        fresh("-c", "from retrain.cli import main; main(['--help'])")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


@pytest.mark.parametrize("threads", ["2", "-1"])
def test_a_fresh_interpreter_keeps_stderr_clean(case, tmp_path, threads):
    code = "import sys; from retrain.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ("trim", "net.pth", "--data", "data.npz", "--out", str(tmp_path / "out"))
    answer = fresh("-c", code, *arguments, "--quiet", "--threads", threads, cwd=case)
    assert answer.stdout == ""
    if threads == "2":
        assert (answer.returncode, answer.stderr) == (0, "")
    else:
        assert answer.returncode == 2
        assert answer.stderr == "retrain: error: threads: got -1, want a whole number >= 1\n"


def test_a_terminal_gets_a_progress_bar(case, tmp_path):
    """A pty on stderr: escape codes while it runs, the lines of the layers in between."""
    ours, theirs = pty.openpty()
    code = "import sys; from retrain.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ("trim", "net.pth", "--data", "data.npz", "--out", str(tmp_path / "out"))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=case,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "layers" in text
    assert "/3" in text
    assert "\x1b[" in text
    assert "0: " in text


def test_a_reader_that_goes_away_is_no_error(case):
    code = "import sys; from retrain.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "layers", "net.pth"],
        cwd=case,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_demo_compares_both_schemes(tmp_path):
    answer = command(tmp_path, "demo", "--out", "demo", "--threads", "1", seconds=90)
    assert answer.code == 0, answer
    for word in ("cascade", "parallel", "accuracy", "proven at most", "calibration", "held-out"):
        assert word in answer.out
    for scheme in ("cascade", "parallel"):
        assert read_record(tmp_path / "demo" / scheme)["state"] == "finished"


def test_a_former_name_is_read_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dense(6, 5, 3).state_dict(), "net.pt")
    np.save("x.npy", rows(40, 6))
    for now, former, said in (
        (
            ("trim", "--gap", "1e-4", "--violation", "1e-5"),
            ("trim", "--tolerance", "1e-4,1e-5"),
            "retrain trim: warning: --tolerance is now called --gap and --violation",
        ),
        (
            ("lobs", "--layer-error", "0.1"),
            ("lobs", "--tolerance", "0.1"),
            "retrain lobs: warning: --tolerance is now called --layer-error",
        ),
    ):
        bytes_ = []
        for arguments in (now, former):
            verb, *options = arguments
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                main([verb, "net.pt", "--data", "x.npy", *options, "--out", verb + options[0]])
            assert (said in err.getvalue()) == (arguments is former)
            bytes_.append((tmp_path / (verb + options[0]) / "model.safetensors").read_bytes())
        assert bytes_[0] == bytes_[1]
    for text in ("tight", "1,1,1"):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert (
                main(["trim", "net.pt", "--data", "x.npy", "--tolerance", text, "--out", "x"]) == 2
            )
        assert f"--tolerance: got '{text}', want GAP or GAP,VIOLATION" in err.getvalue()


def stated_defaults(verb):
    """What the help of a command says to be the default of its options."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), pytest.raises(SystemExit):
        main([verb, "--help"])
    parts = re.split(r"^  (--[a-z-]+)", page.getvalue(), flags=re.MULTILINE)
    found = {}
    for name, said in zip(parts[1::2], parts[2::2], strict=True):
        default = re.search(r"default\s+([\w.-]+)", said)
        if default:
            found[name[2:].replace("-", "_")] = default[1].rstrip(".")
    return found


def test_help_states_the_defaults_of_the_library():
    """The commands leave what is not given to the library, so only the help can be wrong."""
    fields = {"gap": "tolerance", "violation": "violation_tolerance"}
    library = {
        "trim": {**vars(NetTrimOptions()), **defaults_of(retrain.net_trim)},
        "lobs": {**vars(LobsOptions(sparsity=0.5)), **defaults_of(retrain.lobs)},
    }
    counted = 0
    for verb, own in library.items():
        for name, said in stated_defaults(verb).items():
            value = own.get(fields.get(name, name))
            if value is None:
                continue  # such as --threads, whose help says what None means
            if name == "memory":
                value /= 2**30
            if name == "penalty":
                value = value.name
            same = float(said) == value if isinstance(value, int | float) else said == value
            assert same, (verb, name, said, value)
            counted += 1
    assert counted >= 15


def defaults_of(verb):
    return {name: entry.default for name, entry in inspect.signature(verb).parameters.items()}
