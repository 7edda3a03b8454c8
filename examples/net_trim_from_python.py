"""Net-Trim from Python: train, prune with a certificate, and read the bound beside the measurement.

A small ReLU network is trained on scikit-learn's digits with a plain torch loop. `retrain.net_trim`
then replaces each layer's weights by sparser ones. Every layer comes with a certificate, and the
run with a bound on how far the network's outputs moved, beside the measured deviation.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import retrain

digits = load_digits()
x = (digits.data / 16).astype("float32")
y = digits.target
train, test = (x[:1400], y[:1400]), (x[1400:], y[1400:])

# 1. Any trained network will do. This one is trained here, on all samples at once.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
inputs, labels = torch.from_numpy(train[0]), torch.from_numpy(train[1])
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()

# 2. Prune it on 500 of the samples. Each layer's response may move by 5 % of its norm; the model
#    given is not changed.
calibration = (train[0][:500], train[1][:500])
run = retrain.net_trim(model, calibration, evaluate=test, scheme="cascade", relative_epsilon=0.05)

# 3. What became of each layer. The certificate is the duality gap and the violation, recomputed in
#    float64 from the layer's data: the objective is proven to be within `gap` of the optimum.
for layer in run.layers:
    gap = layer.details.gap
    violation = max(layer.details.ball_violation, layer.details.ceiling_violation)
    verdict = "certified" if layer.certified else f"not certified ({layer.status.value})"
    print(
        f"layer {layer.name}: {layer.sparsity:.1%} zeros, gap {gap:.0e}, "
        f"violation {violation:.0e}, {verdict}"
    )

# 4. How far the outputs moved, in the Frobenius norm over all samples.
for name, bound in run.bounds.items():
    print(f"outputs, {name}: moved by {bound.measured:.2f}, proven at most {bound.best:.2f}")
accuracy = run.record["accuracy"]["held_out"]
print(f"held-out accuracy: {accuracy['before']:.2%} before, {accuracy['after']:.2%} after")
print(f"all layers certified: {run.certified}")
