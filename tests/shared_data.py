"""Where real data and models lie beside the repository; tests that use them are marked.

``@pytest.mark.shared_data("data/mnist")`` names the files that a test needs. It is skipped where
one is missing, with its name; the end of a run says how many there were (`conftest.py`).
"""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def missing(marked):
    """Files that a mark names and that are not there."""
    return [name for name in marked.args if not (SHARED / name).exists()]
