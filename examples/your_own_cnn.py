"""A convolutional network of your own: pruned, saved, loaded, used.

`retrain.lobs` removes exactly as many weights as asked from a module with a `forward` of its own:
here two convolutions with a skip connection. The run directory holds the pruned tensors under the
module's own names. `retrain.load` fills the architecture again; any other program can read
``model.safetensors``.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import retrain


class SmallCNN(nn.Module):
    """Two 3 x 3 convolutions with a skip connection, then one dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return ten scores for each image, (n, 1, 8, 8) to (n, 10)."""
        first = torch.relu(self.stem(images))
        second = torch.relu(self.body(first)) + first
        return self.head(self.pool(second).flatten(1))


digits = load_digits()
x = (digits.images[:, None] / 16).astype("float32")
y = digits.target
train, test = (x[:1400], y[:1400]), (x[1400:], y[1400:])

# 1. Train it.
torch.manual_seed(0)
model = SmallCNN()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
images, labels = torch.from_numpy(train[0]), torch.from_numpy(train[1])
for _ in range(80):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "pruned"

    # 2. Prune it: 70 % of the second convolution, 60 % of the dense layer; the stem stays dense.
    #    A few hundred images are enough to see how the layers' inputs vary.
    calibration = (train[0][:400], train[1][:400])
    sparsity = {"body": 0.7, "head": 0.6}
    run = retrain.lobs(model, calibration, sparsity=sparsity, evaluate=test, out=out)
    for layer in run.layers:
        print(
            f"{layer.name}: {layer.kind} {layer.shape[0]} x {layer.shape[1]}, "
            f"{layer.zeros} of {layer.weights} weights are zero"
        )
    accuracy = run.record["accuracy"]["held_out"]
    print(f"held-out accuracy: {accuracy['before']:.2%} before, {accuracy['after']:.2%} after")
    print(f"outputs moved by {run.measured:.2f} on the calibration data")
    print(f"bound: {run.bound:.2f}" if run.bound is not None else "bound: none")

    # 3. Load it. The class is Python code, which a run directory does not hold, so it is passed.
    again = retrain.load(out, SmallCNN())
    with torch.no_grad():
        same = torch.equal(again.model(images), run.model(images))
    print(f"loaded network gives the same outputs: {same}")

    # 4. Or without this package: the file has the tensors under the module's own names.
    tensors = load_file(out / "model.safetensors")
    plain = SmallCNN()
    plain.load_state_dict(tensors)
    print(f"tensors: {', '.join(sorted(tensors))}")
