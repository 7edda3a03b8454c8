"""Train and prune at once: layers with Bernoulli gates, from a recipe in Python.

A dense network with seven gated layers is trained on scikit-learn's digits. Each gate has a
probability to stay, which is trained with the weights. Layers whose probability falls to zero are
taken out during the training, so that later epochs cost less. What is left is a plain network.
"""

import tempfile
from pathlib import Path

import torch

import retrain

# The tables of a recipe; a TOML file with the same entries does the same on the command line.
recipe = {
    "title": "Layer gates: 8 dense layers on scikit-learn's digits",
    "data": {"train": "digits", "test": "digits-test"},
    "model": {"architecture": "gated-dense", "layers": 8, "width": 48, "inputs": 64},
    "training": {"epochs": 24, "batch_size": 64},
    "optimizer": {"name": "adam", "lr": 0.003},
    # log_gamma is the pressure on the gates: 0 prunes nothing, more negative values prune more.
    "method": {"name": "gates", "log_gamma": -120.0, "theta_rate": 0.04, "fine_tune_epochs": 4},
}


def tell(line: dict, epochs: int) -> None:
    """Print every fourth epoch."""
    if line["epoch"] % 4 == 0:
        print(
            f"epoch {line['epoch']:2} of {epochs}: test accuracy {line['test_accuracy']:.2%}, "
            f"{line['parameters']:6,} parameters, load {line['load'] / line['dense_load']:.0%} "
            "of dense"
        )


with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "gates"
    run = retrain.train(recipe, out=out, on_epoch=tell)

    cost = run.record["cost"]
    print(f"{cost['final']['parameters']:,} of {cost['dense']['parameters']:,} parameters left")
    print(f"training load: {run.record['load'] / run.record['dense_load']:.0%} of the dense one")
    print(f"test accuracy: {run.test_accuracy:.2%}")

    # The saved network has layers of torch's own only; loading it needs no code of the trainer.
    model = retrain.load(out).model
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    print(f"{len(linear)} of 9 dense layers left")
