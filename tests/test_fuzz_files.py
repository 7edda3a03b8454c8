"""Damaged files of every kind: told in one line as a ValueError, never a traceback, never taken.

Seeded: each format's whole file is cut at random places, has random bytes altered and, where it is
a record, has random entries replaced by values of other types.
"""

import copy
import gzip
import io
import json
import os
import random
import shutil
import zipfile

import numpy as np
import pytest
import torch
from networks import dense, rows
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

import retrain
from retrain.adapters.files.load import load_model
from retrain.api.load import load
from retrain.data.sources import load_data
from retrain.report.terminal import run_table, summary
from retrain.report.training import epoch_line, training_summary
from retrain.runs.directory import open_run, read_record
from retrain.stream.chain import Chain
from retrain.stream.stream import LayerSpec
from retrain.trainers.loop.checkpoints import read_checkpoint
from retrain.trainers.loop.images import ImageFolder
from retrain.trainers.recipes.recipe import read_recipe
from retrain.verify import runner

SEED = int(os.environ.get("FUZZ_SEED", "12"))  # any other seed must do as well
CUTS, FLIPS, SWAPS = 40, 80, 300


def refused(read):
    """Whether a reader refuses, in one line and as a ValueError; anything else fails the test."""
    try:
        read()
    except ValueError as error:
        assert str(error).strip()
        return True
    return False


def damaged(whole, rng, cuts=CUTS, flips=FLIPS):
    """Whole files with something wrong: cut short, bytes altered, bytes doubled, in turn."""
    for _ in range(cuts):
        yield whole[: rng.randrange(len(whole))]
    for _ in range(flips):
        altered = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            # Headers are short and bodies long: half of the damage goes to either end.
            span = rng.choice((len(altered), min(len(altered), 300)))
            place = rng.randrange(span)
            place = place if rng.random() < 0.7 else len(altered) - 1 - place
            altered[place] = rng.choice((altered[place] ^ (1 << rng.randrange(8)), 0, 255, 40, 39))
        yield bytes(altered)
    for _ in range(4):
        place = rng.randrange(len(whole))
        yield whole[:place] + whole[place // 2 :]


OTHERS = (
    None, True, False, -1, 0, 7, 10**30, -0.5, 1e308, "", "x", "é\u2192", "7", "finished", [], {},
    [1], [None], {"a": 1}, [[[]]],
)  # fmt: skip


def places(value, path=()):
    """All places in nested lists and dicts."""
    yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


def swapped(record, rng, count=SWAPS):
    """Copies of a record with one or two entries replaced or missing."""
    every = [path for path in places(record) if path]
    for _ in range(count):
        new = copy.deepcopy(record)
        for path in rng.sample(every, rng.choice((1, 1, 2))):
            holder = new
            try:
                for key in path[:-1]:
                    holder = holder[key]
                if rng.random() < 0.2:
                    del holder[path[-1]]
                else:
                    holder[path[-1]] = rng.choice(OTHERS)
            except (KeyError, TypeError, IndexError):
                continue  # inside what was replaced before
        yield new


def try_all(path, contents, read, at_least=0.3):
    """Write each content and read it; most must be refused, or the damage was none."""
    count = refusals = 0
    for content in contents:
        path.write_bytes(content)
        count += 1
        refusals += refused(read)
    assert refusals > at_least * count
    return refusals


# --- data ---------------------------------------------------------------------------------------


def data_files(folder):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5)).astype(np.float32), rng.integers(0, 3, 20)
    np.save(folder / "a.npy", x)
    np.save(folder / "b.npy", np.asfortranarray(x.astype(">f8")))
    np.savez(folder / "c.npz", x=x, y=y)
    np.savez_compressed(folder / "d.npz", x=x, y=y)
    for number, kind in enumerate((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(folder / f"e{number}.npz", "w", kind) as archive:
            archive.writestr("x.npy", (folder / "a.npy").read_bytes())
    return [*sorted(folder.glob("*.np?"))]


def test_arrays(tmp_path):
    for path in data_files(tmp_path):
        rng = random.Random(f"{SEED}{path.name}")
        try_all(path, damaged(path.read_bytes(), rng), lambda path=path: load_data(path))


def test_every_cut_of_an_array_s_header(tmp_path):
    """An opening bracket without its end makes numpy's header reader raise TokenError."""
    path = data_files(tmp_path)[0]
    whole = path.read_bytes()
    for end in range(11, whole.index(b"}")):
        body = whole[8:end].ljust(118, b" ") + b"\n"
        path.write_bytes(whole[:8] + len(body[2:]).to_bytes(2, "little") + body[2:] + whole[128:])
        assert refused(lambda: load_data(path)), end


HEADERS = {
    "unclosed": "{'descr': '<f4', 'fortran_order': False, 'shape': (20, 5",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-20, -5), }",
    "huge": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000000, 5), }",
    "huge and empty": "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 90000000000000000), }",
    "overflowing": "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ",), }",
    "many axes": "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 40 + "100), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (20, 5), }",
    "fields": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (20, 5), }",
    "odd fields": "{'descr': [('a',)], 'fortran_order': False, 'shape': (20, 5), }",
    "text": "{'descr': '<U4', 'fortran_order': False, 'shape': (20, 5), }",
    "type": "{'descr': 3, 'fortran_order': False, 'shape': (20, 5), }",
    "order": "{'descr': '<f4', 'fortran_order': 'x', 'shape': (20, 5), }",
    "true": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 100.0), }",
    "deep": "{'descr': '<f4', 'shape': " + "(" * 5000 + "}",
    "call": "{'descr': '<f4', 'fortran_order': False, 'shape': print(1), }",
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_that_lie(tmp_path, name, version):
    text = HEADERS[name].encode()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(400))
    with pytest.raises(ValueError, match=r"^data: .*a\.npy"):
        load_data(path)


def test_encrypted_and_doubled_members(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((4, 3), np.float32))
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    whole = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(mark) + offset] |= 1  # the flag that says encrypted
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"'x' in .* is encrypted; save it without a password"):
        load_data(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x.npy", buffer.getvalue())
        archive.writestr("x.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="has an array twice"):
        load_data(path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    rng = random.Random(SEED)
    end = ".gz" if packed else ""
    images = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (6, 5, 4))
    images += rng.randbytes(120)
    labels = bytes((0, 0, 8, 1, 0, 0, 0, 6)) + bytes((0, 1, 2, 0, 1, 2))
    paths = [tmp_path / f"train-{name}-ubyte{end}" for name in ("images-idx3", "labels-idx1")]
    for path, content in zip(paths, (images, labels), strict=True):
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    for path in paths:
        whole = path.read_bytes()
        least = 0.3 if packed else 0.2
        try_all(path, damaged(whole, rng), lambda: load_data(f"mnist:{tmp_path}"), least)
        path.write_bytes(whole)
    assert len(load_data(f"mnist:{tmp_path}")) == 6


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it reads all the same
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "ppm", "tiff", "webp"])
def test_images(tmp_path, kind):
    folder = tmp_path / "images"
    (folder / "class").mkdir(parents=True)
    path = folder / "class" / f"a.{kind}"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    try_all(
        path, damaged(whole, random.Random(SEED)), lambda: ImageFolder(folder, 8)[slice(0, 1)], 0.1
    )


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a.safetensors", "b.pt", "c.pt", "d.pt"])
def test_networks(tmp_path, kind):
    path, state = tmp_path / kind, dense(6, 5, 3).state_dict()
    if kind == "a.safetensors":
        save_file(state, path)
    elif kind == "b.pt":
        torch.save(state, path)
    elif kind == "c.pt":
        torch.save({"epoch": 3, "net": state, "note": "é"}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    rng = random.Random(SEED)
    try_all(path, damaged(path.read_bytes(), rng, 60, 240), lambda: load_model(path), 0.25)


def test_exported_programs(tmp_path):
    path = tmp_path / "a.pt2"
    torch.export.save(torch.export.export(dense(6, 5, 3).eval(), (torch.zeros(2, 6),)), path)
    rng = random.Random(SEED)
    contents = damaged(path.read_bytes(), rng, 10, 30)
    try_all(path, contents, lambda: load_model(path, trust=True), 0.2)


# --- runs ---------------------------------------------------------------------------------------


def chain():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(9, 6)), rng.normal(size=(7, 4))]
    return Chain(tuple(weights), (True, True), ("relu", "linear"))


SAMPLES = np.random.default_rng(1).normal(size=(30, 8)), np.arange(30) % 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One finished run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    retrain.net_trim(chain(), SAMPLES, out=folder / "net-trim", evaluate=SAMPLES)
    retrain.net_trim(chain(), SAMPLES, sparsity=0.5, out=folder / "sparsity")
    retrain.net_trim(
        chain(), SAMPLES, sparsity=0.5, sparsity_of="network", max_trials=2, out=folder / "search"
    )
    retrain.lobs(chain(), SAMPLES, sparsity=0.5, out=folder / "lobs")
    retrain.lobs(chain(), SAMPLES, sparsity=[0.3, 0.5], out=folder / "stages")
    x = rows(30, 6, seed=1)
    retrain.lobs(dense(6, 5, 3), x, sparsity=0.5, out=folder / "module")
    retrain.train(TABLES, out=folder / "training", data=(x, np.arange(30) % 3))
    return folder


TABLES = {
    "data": {},
    "model": {"architecture": "dense", "widths": [6, 5, 3]},
    "training": {"epochs": 2, "batch_size": 8},
    "optimizer": {"name": "adam", "lr": 0.01},
    "schedule": {"name": "cosine"},
    "method": {"name": "itp", "trade_off": 0.001},
}
LAYER_RUNS = ("net-trim", "sparsity", "search", "lobs", "stages", "module")


def show(path):
    """Load a run and say all that is said of it: what is accepted must be fit for use."""
    run = load(path)
    if path.name == "training":
        training_summary(run.record)
        for line in run.history:
            epoch_line(line, 2)
    else:
        run_table(run.layers)
        summary(run.record, run.layers, run.bounds)
    assert run.model is not None


@pytest.mark.parametrize("name", [*LAYER_RUNS, "training"])
def test_records(runs, tmp_path, name):
    shutil.copytree(runs / name, tmp_path / name)
    path, rng = tmp_path / name / "run.json", random.Random(f"{SEED}{name}")
    record = json.loads(path.read_text())
    contents = (json.dumps(new).encode() for new in swapped(record, rng))
    try_all(path, contents, lambda: show(tmp_path / name), 0.05)
    contents = damaged(path.read_bytes(), rng, 20, 30)
    try_all(path, contents, lambda: show(tmp_path / name), 0.2)


def test_a_state_of_another_type_is_not_finished(runs, tmp_path):
    shutil.copytree(runs / "lobs", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    for state in (*OTHERS[:-8], "Finished", "finished "):
        path.write_text(json.dumps({**record, "state": state}))
        if state != "finished":
            with pytest.raises(ValueError, match=r"state|not finished"):
                load(tmp_path / "run")
    for text in (
        '{"format": 1, "state": "finished", "state": "running"}',
        '{"format": 1, "state": "\\ud800"}',
        '{"format": 1, "state": "finished", "seconds": NaN}',
        '{"format": 1, "state": "finished", "seconds": 1e999}',
        '{"format": 1, "state": "finished", "seconds": ' + "9" * 5000 + "}",
        '{"format": 1, "state": "finished", "seconds": ' + "[" * 5000 + "]" * 5000 + "}",
        "\ufeff{}",
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"run\.json: is damaged .*delete the directory"):
            read_record(tmp_path / "run")


SPEC = LayerSpec("0", "linear", (8, 6), True, "relu", 1)


def test_layer_files(runs, tmp_path):
    """No altered byte of a finished layer is taken over, be it of its weights or its report."""
    shutil.copytree(runs / "net-trim", tmp_path / "run")
    path = tmp_path / "run" / "layers" / "000.safetensors"
    whole, rng = path.read_bytes(), random.Random(SEED)
    identity = read_record(tmp_path / "run")["identity"]
    with open_run(tmp_path / "run", identity, ("0", "1")) as directory:
        kept = directory.read_layer(SPEC)
        for content in damaged(whole, rng, 60, 300):
            path.write_bytes(content)
            if not refused(lambda: directory.read_layer(SPEC)):
                found = directory.read_layer(SPEC)
                assert found.report == kept.report
                np.testing.assert_array_equal(found.weights[0], kept.weights[0])


def test_layer_reports(runs, tmp_path):
    for name in ("sparsity", "lobs"):
        shutil.copytree(runs / name, tmp_path / name)
        path = tmp_path / name / "layers" / "000.safetensors"
        identity, rng = read_record(tmp_path / name)["identity"], random.Random(SEED)
        with open_run(tmp_path / name, identity, ("0", "1")) as directory:
            result = directory.read_layer(SPEC)
            count = 0
            for report in swapped(result.report.to_json(), rng):
                save_arrays({"weight.0": result.weights[0]}, path, {"report": json.dumps(report)})
                if refused(lambda directory=directory: directory.read_layer(SPEC)):
                    count += 1
                else:
                    run_table([directory.read_layer(SPEC).report])
            assert count > 100


# --- training -----------------------------------------------------------------------------------


def test_histories(runs, tmp_path):
    shutil.copytree(runs / "training", tmp_path / "training")
    path, rng = tmp_path / "training" / "history.jsonl", random.Random(SEED)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    contents = (
        "".join(json.dumps(line) + "\n" for line in new).encode() for new in swapped(lines, rng)
    )
    try_all(path, contents, lambda: show(tmp_path / "training"))


def entries(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_checkpoints_with_other_types(runs, tmp_path):
    """Whatever is in a checkpoint, resuming refuses it or goes on; `ended` is true or false."""
    folder, rng = tmp_path / "training", random.Random(SEED)
    shutil.copytree(runs / "training", folder)
    whole = entries(folder)
    x = rows(30, 6, seed=1)
    record = json.loads((folder / "run.json").read_text())
    begun = {key: record[key] for key in ("format", "identity")} | {"state": "running"}
    count = 0
    for number, new in enumerate(swapped(whole, rng, 150)):
        new = {**whole, "ended": OTHERS[number]} if number < len(OTHERS) else new
        torch.save(new, folder / "checkpoint.pt")
        (folder / "run.json").write_text(json.dumps(begun))
        (folder / "history.jsonl").write_bytes((runs / "training" / "history.jsonl").read_bytes())
        shown = refused(lambda: retrain.train(TABLES, out=folder, data=(x, np.arange(30) % 3)))
        count += shown
        if number < len(OTHERS):
            assert shown == (not isinstance(OTHERS[number], bool)), OTHERS[number]
    assert count > 50


def test_checkpoints_with_other_bytes(runs, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = (runs / "training" / "checkpoint.pt").read_bytes()
    try_all(path, damaged(whole, random.Random(SEED)), lambda: read_checkpoint(path))


RECIPE = """
title = "digits"
[data]
train = "digits"
[model]
architecture = "dense"
widths = [64, 8, 10]
[training]
epochs = 2
[optimizer]
name = "adam"
lr = 0.01
[method]
name = "gates"
log_gamma = -9.0
"""


def test_recipes(tmp_path):
    path, rng = tmp_path / "r.toml", random.Random(SEED)
    try_all(path, damaged(RECIPE.encode(), rng, 30, 60), lambda: read_recipe(path))
    deep = ["[" * 5000, "a" + ".a" * 20_000 + " = 1", "[data]\ntrain = " + "{a=" * 3000]
    deep += ["[training]\nepochs = " + "9" * 5000, "x = 1\nx = 2", "[data]\ntrain = 1979-05-27"]
    for text in deep:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"recipe"):
            read_recipe(path)


def test_a_recipe_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert read_recipe(path).title == "digits"
    path.write_text(RECIPE, encoding="utf-16")
    with pytest.raises(ValueError, match=r"r\.toml is not a TOML file \(UTF-16; save it as UTF-8"):
        read_recipe(path)


def test_rows_of_verify(tmp_path):
    """A row that is cut is done again; one of other types is refused by file and line."""
    name = "net-trim/theorem-1"
    runner.run([name], out=tmp_path)
    path, rng = next((tmp_path / "rows").iterdir()), random.Random(SEED)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    fingerprint, count = lines[0]["fingerprint"], 0
    for new in swapped(lines, rng, 200):
        path.write_text("".join(json.dumps(line) + "\n" for line in new))
        count += refused(lambda: runner.kept_answers(tmp_path, name, fingerprint))
    assert count > 30
    for content in damaged("".join(json.dumps(line) + "\n" for line in lines).encode(), rng):
        path.write_bytes(content)
        refused(lambda: runner.kept_answers(tmp_path, name, fingerprint))
