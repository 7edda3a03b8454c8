"""Fine-tuning: zeros stay zero under any optimiser; the rest is the smaller network's training."""

import copy

import pytest
import torch
from networks import dense, samples
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from retrain.trainers.loop.callbacks import Callbacks
from retrain.trainers.loop.masked import fine_tune, masks_of, weights_of
from retrain.trainers.loop.supervised import train

OPTIMIZERS = {
    "plain": lambda m: SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: SGD(
        m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda m: Adam(m.parameters(), lr=0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "rmsprop": lambda m: RMSprop(m.parameters(), lr=0.01, momentum=0.9),
}


class Restless(SGD):
    """An optimiser that moves every weight at every step, also those without a gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


OPTIMIZERS["restless"] = lambda m: Restless(m.parameters(), lr=0.1)


def pruned():
    model = dense(6, 8, 3)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.view(-1)[::3] = 0
        model[0].bias[:2] = 0
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_are_exact_after_every_step_and_the_rest_moves(optimizer):
    model = pruned()
    before = copy.deepcopy(model.state_dict())
    masks = masks_of(model)
    assert set(masks) == {"0.weight", "2.weight"}
    assert all(0 < mask.sum() < mask.numel() for mask in masks.values())
    seen = []

    def after_epoch(epoch, trained, optimizer):
        for name, mask in masks.items():
            weight = trained.get_parameter(name)
            assert (weight[~mask] == 0).all() and not torch.signbit(weight[~mask]).any()
        seen.append(epoch.number)

    # One step an epoch: what holds after every epoch holds after every step.
    result = fine_tune(
        model,
        samples(),
        epochs=20,
        optimizer=OPTIMIZERS[optimizer],
        batch_size=50,
        callbacks=Callbacks(after_epoch=(after_epoch,)),
    )
    assert seen == list(range(20))
    for name, mask in masks.items():
        assert (result.model.get_parameter(name)[mask] != before[name][mask]).all()
    assert (result.model[0].bias != before["0.bias"]).all()
    assert result.history[-1].loss < result.history[0].loss
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_without_a_mask_the_zeros_come_back():
    """The check above can fail: plain training moves the same weights."""
    model = pruned()
    masks = masks_of(model)
    moved = train(model, samples(), epochs=1).model
    assert (moved[0].weight[~masks["0.weight"]] != 0).any()
    free = fine_tune(model, samples(), epochs=1, masks={}).model
    assert all(
        torch.equal(a, b) for a, b in zip(free.parameters(), moved.parameters(), strict=True)
    )


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_equals_training_the_smaller_network(optimizer):
    """Hidden units without links are as good as absent, also for a norm over all gradients."""
    kept = [0, 3, 4, 7]
    big = dense(6, 8, 3).double()
    with torch.no_grad():
        for unit in set(range(8)) - set(kept):
            big[0].weight[unit] = 0
            big[2].weight[:, unit] = 0
    small = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    small.load_state_dict(
        {
            "0.weight": big[0].weight[kept],
            "0.bias": big[0].bias[kept],
            "2.weight": big[2].weight[:, kept],
            "2.bias": big[2].bias,
        }
    )
    x, y = samples()
    norms = []

    def clip(step):
        norms.append(nn.utils.clip_grad_norm_(step.model.parameters(), 0.1).item())

    options = {
        "epochs": 10,
        "batch_size": 16,
        "optimizer": OPTIMIZERS[optimizer],
        "callbacks": Callbacks(after_backward=(clip,)),
    }
    tuned = fine_tune(big, (x.double(), y), **options).model
    wanted = train(small, (x.double(), y), **options).model
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(tuned[0].weight[kept], wanted[0].weight, **close)
    torch.testing.assert_close(tuned[0].bias[kept], wanted[0].bias, **close)
    torch.testing.assert_close(tuned[2].weight[:, kept], wanted[2].weight, **close)
    torch.testing.assert_close(tuned[2].bias, wanted[2].bias, **close)
    assert max(norms) > 0.1


def test_given_masks_prune_first_and_may_free_zeros():
    model = pruned()
    half = torch.zeros(8, 6, dtype=torch.bool)
    half[:, :3] = True
    result = fine_tune(model, samples(), epochs=3, masks={"0.weight": half})
    assert (result.model[0].weight[:, 3:] == 0).all()
    assert (result.model[0].weight[:, :3] != 0).all()
    assert (result.model[2].weight != 0).all()
    untrained = fine_tune(model, samples(), epochs=0, masks={"0.weight": half})
    assert (untrained.model[0].weight[:, 3:] == 0).all()
    assert torch.equal(untrained.model[0].weight[:, :3], model[0].weight[:, :3])
    bias = fine_tune(model, samples(), epochs=3, masks={"2.bias": torch.zeros(3) > 0}).model[2].bias
    assert (bias == 0).all()


def test_a_frozen_parameter_may_be_masked():
    model = pruned()
    model[0].weight.requires_grad_(False)
    result = fine_tune(model, samples(), epochs=2)
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert not torch.equal(result.model[2].weight, model[2].weight)


def test_default_weights_are_neither_biases_nor_scales():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "prelu": nn.PReLU(),
        }
    )
    assert list(weights_of(model)) == [
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert list(weights_of(model, ["prelu.weight", "conv.weight"])) == [
        "conv.weight",
        "prelu.weight",
    ]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"1.weight": torch.ones(8, 6) > 0},
            "masks: the model has no parameter '1.weight'; it has",
        ),
        (
            {"0.weight": torch.ones(6, 8) > 0},
            r"masks: '0\.weight': got torch\.bool of shape \(6, 8\), want torch\.bool of",
        ),
        (
            {"0.weight": torch.ones(8, 6)},
            r"masks: '0\.weight': got torch\.float32 of shape \(8, 6\), want torch\.bool",
        ),
    ],
)
def test_wrong_masks_are_told(masks, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(dense(6, 8, 3), samples(), epochs=1, masks=masks)


def test_wrong_names_are_told():
    with pytest.raises(ValueError, match=r"names: the model has no parameter 'a', 'b'; it has 0\."):
        masks_of(dense(6, 8, 3), ["b", "0.weight", "a"])
