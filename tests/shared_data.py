"""Where real data and models lie beside the repository; tests that use them are marked.

``@pytest.mark.shared_data("data/regression/wq.npz")`` names the files that a test needs. It is
skipped where one is missing, with its name; the end of a run says how many there were
(`conftest.py`).
"""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

MNIST = tuple(
    f"data/mnist/{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
AUTHORS = "data/lobs-authors/lobs_LeNet300100_hessian_mask_pruned.npz"
LENET = "data/models/lobs_LeNet300100_pretrain.pth"


def missing(marked):
    """Files that a mark names and that are not there."""
    return [name for name in marked.args if not (SHARED / name).is_file()]
