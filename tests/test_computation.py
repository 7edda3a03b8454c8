"""Mixed precision: the weights stay float32, scaling changes nothing, refusals are clear."""

import pytest
import torch
from networks import dense
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.optim import SGD

from retrain.trainers.loop.callbacks import Callbacks
from retrain.trainers.loop.computation import Computation, computation
from retrain.trainers.loop.supervised import fit

CPU = torch.device("cpu")


def fitted(how, *, lr=0.1, scale_data=1.0):
    """Train a small network two epochs; return its weights, the losses, the gradients seen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator) * scale_data
    y = torch.randint(3, (40,), generator=generator)
    model = dense(6, 8, 3)
    seen = []
    history = fit(
        model,
        (x, y),
        epochs=2,
        optimizer=SGD(model.parameters(), lr=lr, momentum=0.9),
        generator=generator,
        batch_size=16,
        penalty=lambda model: 0.01 * model[0].weight.abs().sum(),
        callbacks=Callbacks(
            after_backward=(lambda step: seen.append(model[2].weight.grad.clone()),)
        ),
        computation=how,
    )
    return [p.detach() for p in model.parameters()], [epoch.loss for epoch in history], seen


def test_a_scaled_loss_gives_the_same_steps_and_callbacks_see_true_gradients():
    """A power of two scales without rounding."""
    plain, scaled = fitted(Computation()), fitted(Computation(scaler=GradScaler("cpu")))
    assert plain[1] == scaled[1]
    for a, b in zip(plain[0] + plain[2], scaled[0] + scaled[2], strict=True):
        assert torch.equal(a, b)


def test_a_step_whose_gradient_overflows_is_left_out():
    huge = GradScaler("cpu", init_scale=2.0**127)
    weights, _, seen = fitted(Computation(scaler=huge), scale_data=1e3)
    assert not all(bool(gradient.isfinite().all()) for gradient in seen)
    assert all(bool(weight.isfinite().all()) for weight in weights)
    assert huge.get_scale() < 2.0**127


def test_bfloat16_is_near_float32_and_its_weights_stay_float32():
    plain, half = fitted(Computation()), fitted(computation("bfloat16", CPU))
    assert plain[1] != half[1]
    assert half[1] == pytest.approx(plain[1], rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in half[0])


def test_the_forward_pass_is_in_half_and_the_loss_is_not():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    outputs = computation("bfloat16", CPU).forward(Spy(4, 2), torch.ones(3, 4))
    assert seen == [torch.bfloat16]
    assert outputs.dtype == torch.float32
    assert (
        functional.cross_entropy(outputs, torch.zeros(3, dtype=torch.long)).dtype == torch.float32
    )


def test_refusals():
    with pytest.raises(
        ValueError, match="precision: got 'int8', want float32, bfloat16 or float16"
    ):
        computation("int8", CPU)
    with pytest.raises(ValueError, match="float16 is for CUDA; use bfloat16 on a CPU"):
        computation("float16", CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_on_a_gpu(precision):
    device = torch.device("cuda")
    how = computation(precision, device)
    model = nn.Linear(4, 2).to(device)
    optimizer = SGD(model.parameters(), lr=0.1)
    loss = how.forward(model, torch.ones(3, 4, device=device)).square().mean()
    how.backward(loss, None, 1.0)
    how.unscale(optimizer)
    how.step(optimizer)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
