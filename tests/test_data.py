"""Data sources: what comes back, and one clear line for whatever is wrong."""

import gzip
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from shared_data import MNIST, SHARED

from retrain.data.arrays import Data, parse_normalise
from retrain.data.factories import import_factory
from retrain.data.sources import as_data, load_data

FOLDER = SHARED / "data" / "mnist"


def idx(array, *, shape=None, code=8):
    """The bytes of an idx file; `shape` lets the header lie."""
    shape = array.shape if shape is None else shape
    return (
        bytes((0, 0, code, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)


@pytest.fixture(params=["", ".gz"])
def mnist(request, tmp_path, images):
    pack = gzip.compress if request.param else bytes
    for prefix, part in (("train", images), ("t10k", images[:3])):
        labels = np.arange(len(part), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte{request.param}").write_bytes(pack(idx(part)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{request.param}").write_bytes(pack(idx(labels)))
    return tmp_path


def test_npz_with_and_without_labels(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(5), z=np.ones(1))
    np.savez_compressed(tmp_path / "b.npz", x=x.astype(np.float32))
    data = load_data(tmp_path / "a.npz")
    assert data.x.dtype == np.float64 and (data.x == x).all() and (data.y == np.arange(5)).all()
    assert data.name == str(tmp_path / "a.npz") and len(data) == 5
    other = load_data(str(tmp_path / "b.npz"))
    assert other.y is None and other.x.dtype == np.float32


@pytest.mark.parametrize(
    "x", [np.arange(12).reshape(4, 3), np.asfortranarray(np.arange(12.0).reshape(4, 3))]
)
def test_npy_and_limit(tmp_path, x):
    np.save(tmp_path / "a.npy", x)
    assert (load_data(tmp_path / "a.npy").x == x).all()
    assert (load_data(tmp_path / "a.npy", limit=2).x == x[:2]).all()
    assert (load_data(tmp_path / "a.npy", limit=99).x == x).all()


def test_types_become_native_float32_or_float64(tmp_path):
    for dtype, wanted in ((np.uint8, "f4"), (np.float16, "f4"), (">f4", "f4"), (">f8", "f8")):
        np.save(tmp_path / "a.npy", np.ones((2, 2), dtype=dtype))
        data = load_data(tmp_path / "a.npy")
        assert data.x.dtype == np.dtype(wanted) and data.x.dtype.isnative and (data.x == 1).all()


def test_mnist(mnist, images):
    data = load_data(f"mnist:{mnist}")
    assert data.x.shape == (7, 1, 28, 28) and data.x.dtype == np.float32
    assert (data.x[:, 0] == images.astype(np.float32) / np.float32(255)).all()
    assert data.flat.shape == (7, 784) and (data.y == np.arange(7)).all()
    assert len(load_data(f"mnist-test:{mnist}")) == 3
    assert (load_data(f"mnist:{mnist}", limit=2).x == data.x[:2]).all()


@pytest.mark.shared_data(*MNIST)
def test_real_mnist_is_centred_by_its_usual_constants():
    data = load_data(f"mnist:{FOLDER}", limit=5000, normalise="0.1307,0.3081")
    assert abs(data.x.mean()) < 0.02 and abs(data.x.std() - 1) < 0.02
    assert data.y.max() == 9


def test_digits_are_split_once_and_for_all():
    train, test = load_data("digits"), load_data("digits-test")
    assert train.x.shape == (1437, 1, 8, 8) and test.x.shape == (360, 1, 8, 8)
    assert train.x.min() == 0 and train.x.max() == 1
    assert load_data("digits").fingerprint == train.fingerprint
    seen = {image.tobytes() for image in train.x} & {image.tobytes() for image in test.x}
    assert not seen  # no digit is in both


def test_factory_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_source_a.py").write_text(
        "import numpy as np\n"
        "def both(): return np.ones((3, 2)), [0, 1, 2]\n"
        "def alone(): return [[1, 2], [3, 4]]\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert (load_data("my_source_a:both").y == [0, 1, 2]).all()
    assert (load_data("my_source_a:alone", limit=1).x == [[1, 2]]).all()
    assert str(tmp_path) not in sys.path
    for spec, text in [
        ("my_source_a:value", "is a int, want a callable"),
        ("my_source_a:no", "has no 'no'"),
        ("no_such_module_b:f", "No module named 'no_such_module_b'"),
        (":f", "want package.module:factory"),
    ]:
        with pytest.raises(ValueError, match=f"data: .*{text}"):
            import_factory(spec, "data")


def test_normalise_by_number_and_by_channel(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 3, 2, 2))
    assert parse_normalise("0.5,2") == (0.5, 2.0)
    assert parse_normalise("1,2,3,4") == ((1.0, 2.0), (3.0, 4.0))
    mean, std = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])
    np.save(tmp_path / "a.npy", x)
    got = load_data(tmp_path / "a.npy", normalise=(mean, std)).x
    assert (load_data(tmp_path / "a.npy", normalise="1,2,3,1,2,4").x == got).all()
    for c in range(3):
        np.testing.assert_allclose(got[:, c], (x[:, c] - mean[c]) / std[c])


@pytest.mark.parametrize(
    ("normalise", "text"),
    [
        ("1", "want MEAN,STD"),
        ("a,b", "want MEAN,STD"),
        ("", "want MEAN,STD"),
        ("0,0", "positive STDs"),
        ("0,nan", "positive STDs"),
        ("0,-1", "positive STDs"),
        ("0,1e-300", "zero in float32"),
        ("1,2,3,4", "want one of each, or 3"),
        ((0.0, (1.0, 2.0)), "want one of each, or 3"),
    ],
)
def test_normalise_errors(tmp_path, normalise, text):
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match=f"normalise: .*{text}"):
        load_data(tmp_path / "a.npy", normalise=normalise)


class Tensor:
    """Stands for a torch tensor: the module must not need torch to take one."""

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype, self.shape = np.asarray(array), dtype, np.shape(array)

    def detach(self):
        return self

    cpu = float = detach

    def numpy(self):
        return self.array


def test_as_data_takes_what_people_have():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    batches = [(Tensor(x[i : i + 4]), Tensor(y[i : i + 4])) for i in (0, 4)]
    for held in ((x, y), (Tensor(x), y), batches, iter(batches), (x, list(y))):
        data = as_data(held)
        assert (data.x == x).all() and (data.y == y).all()
    for held in (x, Tensor(x), [x[:4], x[4:]], ([part] for part in (x[:4], x[4:])), x.tolist()):
        data = as_data(held, name="mine")
        assert (data.x == x).all() and data.y is None and data.name == "mine"
    assert as_data(data) is data
    assert as_data(Tensor(x, "torch.bfloat16")).x.shape == (6, 2)
    assert as_data("digits-test").name == "digits-test"


def test_as_data_takes_torch_itself():
    torch = pytest.importorskip("torch")
    x, y = torch.arange(12.0).reshape(6, 2).requires_grad_(), torch.arange(6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    assert (as_data(loader).x == x.detach().numpy()).all() and (as_data((x, y)).y == range(6)).all()
    assert as_data(x.detach().bfloat16()).x.dtype == np.float32


@pytest.mark.parametrize(
    ("held", "text"),
    [
        (3, "got a int"),
        ({"x": 1}, "got a int, want an array"),
        ({"labels": np.ones(2)}, "a mapping without inputs"),
        ({"a": np.ones((2, 2)), "b": np.ones((3, 2))}, "got 3 samples, want 2"),
        ([], "there is no sample"),
        (iter([]), "there is no sample"),
        ([{"x": object()}], "got a batch of type dict"),
        ([{"x": np.ones((2, 2))}, {"y": np.ones((2, 2))}], "different keys"),
        ([[]], "got a batch of type list"),
        (np.ones(3), r"shape \(3,\), want \(samples"),
        (np.ones((0, 3)), r"is empty: shape \(0, 3\)"),
        (np.ones((3, 0)), r"is empty: shape \(3, 0\)"),
        (np.array([["a"]]), "dtype <U1"),
        (np.array([[None]]), "dtype object"),
        (np.ones((2, 2), complex), "dtype complex128"),
        (np.array([[1.0, np.nan]]), "NaN or infinite samples"),
        (np.array([[1.0, np.inf]]), "NaN or infinite samples"),
        ((np.ones((2, 2)), np.ones(3)), "2 samples but labels for 3"),
        ((np.ones((2, 2)), np.float64(3)), "labels for a single number"),
        ((np.ones((2, 2)), np.array([1, np.nan])), "NaN or infinite labels"),
        ((np.ones((2, 2)), np.array(["a", "b"])), "labels of dtype <U1"),
        ([np.ones((2, 2)), np.ones((2, 3))], "batches of different shapes"),
        ([(np.ones((2, 2)), np.ones(2)), np.ones((2, 2))], "1 of 2 batches have labels"),
        ([[1.0, 2.0], [3.0]], "not of one length"),
    ],
)
def test_as_data_errors(held, text):
    with pytest.raises(ValueError, match=f"data: .*{text}") as caught:
        as_data(held)
    assert "\n" not in str(caught.value)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_nothing_is_unpickled(tmp_path):
    marker = tmp_path / "it ran"
    hostile = np.array([[Bomb(marker)]], dtype=object)
    np.save(tmp_path / "a.npy", hostile, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=hostile)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb(marker)))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Bomb(marker)))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match="pickled objects, want numbers"):
            load_data(tmp_path / name)
    with pytest.raises(ValueError, match=r"not a readable \.npy array"):
        load_data(tmp_path / "raw.npy")
    with pytest.raises(ValueError, match="not a readable npz file"):
        load_data(tmp_path / "raw.npz")
    assert not marker.exists()


def npy_bytes(shape, payload=b"", dtype="<f8"):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return header.getvalue() + payload


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a readable"),
        (b"\x93NUMPY\x03\x00", "structured"),
        (npy_bytes((1 << 40, 1 << 20)), "its header lies"),
        (npy_bytes((4, 4), bytes(100)), r"needs 128 bytes, the file has 100"),
        (npy_bytes((2, 2), bytes(33)), "needs 32 bytes, the file has 33"),
        (npy_bytes((2, 1), bytes(16), "<c8"), "dtype complex64, want real numbers"),
        (npy_bytes((2, 1), bytes(16), "<M8[s]"), "want real numbers"),
    ],
)
def test_npy_that_lies(tmp_path, content, text):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=f"data: .*{text}"):
        load_data(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(ValueError, match=f"data: .*{text}"):
        load_data(tmp_path / "a.npz")


def test_npz_that_is_cut_or_misses_x(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(50, 50)))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:1000])
    damaged = bytearray(whole)
    damaged[500:600] = bytes(100)
    (tmp_path / "bad.npz").write_bytes(damaged)
    for name in ("cut.npz", "bad.npz"):
        with pytest.raises(ValueError, match="not a readable npz file"):
            load_data(tmp_path / name)
    np.savez(tmp_path / "other.npz", a=np.ones(1), b=np.ones(1))
    with pytest.raises(ValueError, match="has no array 'x'; it holds a, b"):
        load_data(tmp_path / "other.npz")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is truncated: 0 of 16 bytes"),
        (b"\x00\x00\x08\x03" + bytes(5), "is truncated: 9 of 16 bytes"),
        (idx(np.zeros((2, 2, 2), np.uint8), code=13), "no idx file of bytes with 3 dimensions"),
        (idx(np.zeros(20, np.uint8)), "no idx file of bytes with 3 dimensions"),
        (idx(np.zeros(8, np.uint8), shape=(1 << 31, 1 << 31, 1 << 31)), "its header lies"),
        (idx(np.zeros(8, np.uint8), shape=(3, 2, 2)), "truncated"),
        (idx(np.zeros(8, np.uint8), shape=(1, 2, 2)), "its header lies|more bytes than"),
    ],
)
def test_idx_that_lies(tmp_path, images, content, text, packed):
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(7, np.uint8)))
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"data: .*({text})"):
        load_data(f"mnist:{tmp_path}")


def test_idx_gzip_that_is_cut(mnist, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    if not path.exists():
        pytest.skip("only of the packed files")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no whole gzip file"):
        load_data(f"mnist:{tmp_path}")
    path.write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match="is no whole gzip file"):
        load_data(f"mnist:{tmp_path}")


def test_memory_of_a_lying_gzip_header_stays_small(tmp_path):
    """100 MB of claims that gzip's ratio allows, 1 kB of content: reading stops where that ends."""
    content = idx(
        np.random.default_rng(0).integers(0, 256, 100_000, np.uint8), shape=(100, 1000, 1000)
    )
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="is truncated: 100000 of 100000000 bytes"):
        load_data(f"mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("nothing.npz", FileNotFoundError, "there is no file"),
        ("nothing.npy", FileNotFoundError, "there is no file"),
        ("folder.npy", ValueError, "is not a file"),
        ("mnist:nowhere", FileNotFoundError, "there is no folder"),
        ("mnist:folder.npy", FileNotFoundError, "has none of train-images-idx3-ubyte,"),
        ("images.csv", ValueError, "want FILE.npz, FILE.npy, mnist:DIR"),
        ("mnist:", ValueError, "want FILE.npz"),
    ],
)
def test_source_errors(tmp_path, monkeypatch, source, error, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(error, match=f"data: .*{text}") as caught:
        load_data(source)
    assert "\n" not in str(caught.value)


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="limit: got 0"):
        load_data("digits", limit=0)


def test_unequal_mnist_files(mnist, tmp_path):
    for path in tmp_path.glob("train-labels*"):
        path.unlink()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match="7 samples but labels for 5"):
        load_data(f"mnist:{tmp_path}")


def test_fingerprint_sees_values_shapes_types_and_labels_but_not_names():
    x = np.arange(6.0).reshape(2, 3)
    prints = {
        Data(x, None, "a").fingerprint,
        Data(x.reshape(3, 2), None, "a").fingerprint,
        Data(x.astype(np.float32), None, "a").fingerprint,
        Data(x + 1e-12, None, "a").fingerprint,
        Data(x, np.zeros(2), "a").fingerprint,
        Data(x, np.zeros(2, int), "a").fingerprint,
    }
    assert len(prints) == 6
    assert Data(np.asfortranarray(x), None, "b").fingerprint == Data(x, None, "a").fingerprint


def test_torch_is_not_imported():
    code = (
        "import sys, retrain.data.sources as d; d.load_data('digits'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
