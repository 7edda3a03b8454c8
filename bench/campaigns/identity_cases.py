"""What the identity campaign changes: every option, variables of the environment, a network's code.

A row changes one thing. `said` is what the refusal must name (a regular expression); None where the
change must be accepted, since it can change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from retrain.cli import build_parser

COMMANDS: dict[str, tuple[str, ...]] = {
    "trim": ("trim", "net.pth", "--data", "data.npz"),
    "lobs": ("lobs", "net.pth", "--data", "data.npz", "--sparsity", "0.5"),
    "train": ("train", "recipe.toml"),
}
"""The command that each row changes; ``--out`` and ``--quiet`` are added."""


@dataclass(frozen=True)
class Row:
    """One change.

    Attributes
    ----------
    command : str
        A key of `COMMANDS`.
    option : str
        What is changed: an option, a positional argument, a variable, an edit.
    before, after : str
        Its two values as arguments, ``"--seed 3"``; empty for none. Of an edit: texts of the code.
    said : str or None
        What the refusal must name; None where the change must be accepted.
    common : str
        Arguments beside it, where it has an effect with them only.
    runs : bool
        Whether the changed command is a run at all: ``--dry-run`` and ``--list`` are none.
    """

    command: str
    option: str
    before: str
    after: str
    said: str | None
    common: str = ""
    runs: bool = True


DATA = "data was"
WEIGHTS = "weights was"
STEP = "computation.step was"

_BOTH = (
    ("model", "net.pth", "other.pth", WEIGHTS),
    ("model", "net.pth", "net.safetensors", None),
    ("model", "net.pth", "elsewhere/net.pth", None),
    ("model", "net.pth", "prefixed.pth", "tensor names was"),
    ("--arch", "", "--arch chain:relu_net", r"computation\."),
    ("--activation", "--activation tanh", "--activation sigmoid", STEP),
    ("--trust", "", "--trust", None),
    ("--key", "--key net", "--key average", WEIGHTS),
    ("--data", "--data data.npz", "--data test.npz", DATA),
    ("--data", "--data data.npz", "--data elsewhere/data.npz", None),
    ("--limit", "", "--limit 40", DATA),
    ("--normalise", "", "--normalise 0.1,2", DATA),
    ("--evaluate", "", "--evaluate test.npz", None),
    ("--out", "", "", None),
    ("--layers", "--layers 0,2", "--layers 0,4", "layers was"),
    ("--skip", "--skip 0", "--skip 2", "layers was"),
    ("--memory", "", "--memory 3", "options.memory was"),
    ("--fine-tune", "--fine-tune 1", "--fine-tune 2", "fine_tune was 1, is 2"),
    ("--dry-run", "", "--dry-run", None),
    ("--seed", "", "--seed 1", "options.seed was 0, is 1"),
    ("--threads", "--threads 1", "--threads 2", "options.threads was 1, is 2"),
    ("--device", "", "--device cpu", None),
    ("--json", "", "--json", None),
    ("--quiet", "", "--quiet", None),
)
"""Changes of `trim` and `lobs` alike: option, before, after, said."""

_TRIM = (
    ("--jobs", "", "--jobs 2", "options.jobs was 1, is 2", "--scheme parallel"),
    ("--scheme", "", "--scheme parallel", "options.scheme was", ""),
    ("--relative-epsilon", "", "--relative-epsilon 0.1", "relative_epsilon was 0.05, is 0.1", ""),
    ("--epsilon", "--epsilon 0.5", "--epsilon 0.6", "options.epsilon was 0.5, is 0.6", ""),
    ("--sparsity", "--sparsity 0.5", "--sparsity 0.6", "options.sparsity was 0.5, is 0.6", ""),
    ("--sparsity-of", "", "--sparsity-of network", "search was not set", "--sparsity 0.5"),
    ("--max-drop", "--max-drop 5", "--max-drop 50", "search.max_drop was", "{drop}"),
    (
        "--max-trials",
        "--max-trials 2",
        "--max-trials 3",
        "max_trials was 2, is 3",
        "{drop} --max-drop 5",
    ),
    ("--inflation", "", "--inflation 1.3", "options.inflation was 1.1, is 1.3", ""),
    ("--form", "", "--form regularised", "options.form was", ""),
    ("--fit-weight", "--fit-weight 2", "--fit-weight 3", "fit_weight was", "--form regularised"),
    ("--penalty", "", "--penalty elastic:0.1", "options.penalty", ""),
    ("--penalise-bias", "", "--penalise-bias", "options.penalise_bias was", ""),
    ("--link-normalised", "", "--link-normalised", "link_normalised was", "--epsilon 0.001"),
    ("--solver", "--solver admm", "--solver newton", "options.solver was", ""),
    ("--gap", "", "--gap 1e-3", "options.tolerance was", ""),
    ("--violation", "", "--violation 1e-4", "options.violation_tolerance was", ""),
    ("--tolerance", "", "--tolerance 1e-3,1e-4", "options.tolerance was", ""),
    ("--max-iterations", "", "--max-iterations 4999", "max_iterations was 5000, is 4999", ""),
    ("--free-zeros", "", "--free-zeros", "options.zeros was", ""),
    ("--accept-inexact", "", "--accept-inexact", "accept_inexact was", "--max-iterations 10"),
)
_LOBS = (
    ("--jobs", "", "--jobs 2", "options.jobs was 1, is 2", ""),
    ("--method", "", "--method one-shot", "options.method was", ""),
    ("--pattern", "", "--pattern unit", "options.pattern was", ""),
    ("--sparsity", "--sparsity 0.5", "--sparsity 0.6", "options.sparsity was 0.5, is 0.6", ""),
    (
        "--layer-error",
        "--layer-error 0.1",
        "--layer-error 0.2",
        "options.tolerance was",
        "{no sparsity}",
    ),
    ("--tolerance", "--tolerance 0.1", "--tolerance 0.2", "options.tolerance was", "{no sparsity}"),
    ("--sparsity-of", "", "--sparsity-of network", "options.sparsity was", "--sparsity 0.5"),
    ("--stages", "--stages 2", "--stages 3", "stages was", ""),
    ("--calibration", "", "--calibration sequential", "options.calibration was", ""),
    ("--damping", "--damping 0.01", "--damping 0.1", "options.damping was 0.01, is 0.1", ""),
    ("--keep-bias", "", "--keep-bias", "options.bias was", ""),
    ("--free-zeros", "", "--free-zeros", "options.zeros was", ""),
)
_TRAIN = (
    ("recipe", "recipe.toml", "slower.toml", "optimizer.options.lr was"),
    ("recipe", "recipe.toml", "elsewhere/recipe.toml", None),
    ("--list", "", "--list", None),
    ("--out", "", "", None),
    ("--data", "", "--data test.npz", "data.train was"),
    ("--evaluate", "", "--evaluate data.npz", "data.test was"),
    ("--limit", "", "--limit 40", "data.train was"),
    ("--epochs", "", "--epochs 4", "training.epochs was 3, is 4"),
    ("--set", "", "--set training.batch_size=16", "training.batch_size was 20, is 16"),
    ("--set", "", "--set method.strength=0.02", "method.strength was"),
    ("--set", "", "--set model.widths=[16,11,6]", "model.options.widths was"),
    ("--export", "", "--export", None),
    ("--seed", "", "--seed 1", "training.seed was 0, is 1"),
    ("--threads", "", "--threads 2", None),  # in a process that has counted its threads already
    ("--device", "", "--device cpu", None),
    ("--json", "", "--json", None),
    ("--quiet", "", "--quiet", None),
)
_NO_RUN = ("--dry-run", "--list")
_WORDS = {"{drop}": "--evaluate test.npz", "{no sparsity}": ""}


def options() -> Iterator[Row]:
    """Yield the changes of options."""
    for command in ("trim", "lobs"):
        for option, before, after, said in _BOTH:
            common = "--arch chain:relu_net" if option == "--trust" else ""
            runs = option not in _NO_RUN
            yield Row(command, option, before, after, said, common, runs)
    for command, rows in (("trim", _TRIM), ("lobs", _LOBS)):
        for option, before, after, said, common in rows:
            for word, meaning in _WORDS.items():
                common = common.replace(word, meaning)
            yield Row(command, option, before, after, said, common)
    for option, before, after, said in _TRAIN:
        yield Row("train", option, before, after, said, "", option not in _NO_RUN)


def forgotten() -> list[str]:
    """Name the options of the parsers that no row changes."""
    rows = {(row.command, row.option) for row in options()}
    parser = build_parser()
    commands = next(a for a in parser._actions if a.choices and "trim" in a.choices).choices
    missing = []
    for command in COMMANDS:
        for action in commands[command]._actions:  # type: ignore[index]
            name = action.option_strings[-1] if action.option_strings else action.dest
            if name != "--help" and (command, name) not in rows:
                missing.append(f"{command} {name}")
    return missing


# --- the environment ------------------------------------------------------------------------------

VARIABLES: tuple[tuple[str, str, str | None], ...] = (
    ("OPENBLAS_CORETYPE", "Haswell", "kernels.BLAS"),
    ("OPENBLAS_CORETYPE", "Prescott", "kernels.BLAS"),
    ("OPENBLAS_NUM_THREADS", "1", "kernels|cores"),
    ("OMP_NUM_THREADS", "1", "threads|kernels|cores"),
    ("MKL_NUM_THREADS", "1", "threads"),
    ("MKL_CBWR", "COMPATIBLE", "environment.MKL_CBWR was not set"),
    ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2", "environment.MKL_ENABLE_INSTRUCTIONS was not set"),
    ("ATEN_CPU_CAPABILITY", "default", "kernels.torch.kernels was"),
    ("ATEN_CPU_CAPABILITY", "avx2", "kernels.torch.kernels was"),
    ("ONEDNN_MAX_CPU_ISA", "SSE41", "environment.ONEDNN_MAX_CPU_ISA was not set"),
    ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "environment.ONEDNN_DEFAULT_FPMATH_MODE was"),
    ("NUMBA_CPU_NAME", "generic", "kernels.numba.CPU_NAME was"),
    ("NUMBA_OPT", "0", "kernels.numba.OPT was"),
    ("NUMBA_DISABLE_JIT", "1", "kernels.numba.DISABLE_JIT was"),
    ("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_ICL", "kernels.numpy was"),
    ("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2,-FMA", "environment.GLIBC_TUNABLES was not set"),
    ("LOKY_MAX_CPU_COUNT", "1", "cores was|threads was"),
    ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "environment.TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    ("PYTHONHASHSEED", "7", None),
    ("PYTHONOPTIMIZE", "1", None),
    ("LC_ALL", "C", None),
    ("LANG", "tr_TR.UTF-8", None),
    ("TZ", "Asia/Tokyo", None),
    ("HOME", "/nowhere", None),
)
"""Variable, value (against none), what the refusal must name."""

# --- the network's code ---------------------------------------------------------------------------

NETWORK = '''"""A network."""
import torch
from torch import nn
from torch.nn import functional as F

import helpers

GLOBAL = 0.25


def scaled(x):
    return x * GLOBAL


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, eps=1e-5)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.2)
        self.fc1 = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, 12)
        self.fc3 = nn.Linear(12, 6)
        self.skip = 2.0
        self.shift = torch.full((12,), 0.5)
        self.turn = torch.arange(144.0).reshape(12, 12).sin()
        self.register_buffer("mask", torch.full((12,), 0.9), persistent=False)
        power = 2
        self.bend = lambda x: x**power

    def forward(self, x):
        x = x.reshape(-1, 1, 4, 4)
        x = self.drop(self.pool(self.act(self.norm(self.conv(x)))))
        h = self.fc1(torch.flatten(x, 1))
        h = torch.tanh(h) * self.mask + self.shift
        h = scaled(self.bend(h)) + helpers.more(h)
        h = self.fc2(h) + self.skip * h
        h = (h @ self.turn).float()
        h = F.leaky_relu(h, 0.1)
        h = F.layer_norm(h, (12,))
        return F.softmax(self.fc3(h), dim=1)
'''
HELPERS = """def more(x):
    return x + 0.125
"""

EDITS: tuple[tuple[str, str, str, str | None], ...] = (
    ("pooling", "nn.MaxPool2d(2)", "nn.AvgPool2d(2)", r"step was .*MaxPool2d.*is .*AvgPool2d"),
    ("skip weight", "self.skip = 2.0", "self.skip = 0.0", STEP),
    ("activation", "nn.ReLU()", "nn.Sigmoid()", r"step was .*ReLU.*is .*Sigmoid"),
    ("activation function", "torch.tanh(h)", "torch.sigmoid(h)", r"torch.tanh.*torch.sigmoid"),
    ("padding mode", "padding=1)", 'padding=1, padding_mode="circular")', "padding_mode"),
    ("stride of the pool", "nn.MaxPool2d(2)", "nn.MaxPool2d(3, 2, 1)", r"pool was .*kernel_size"),
    ("dilation", "padding=1)", "padding=2, dilation=2)", r"conv was .*padding"),
    ("eps of the norm", "eps=1e-5", "eps=1e-2", r"norm was .*eps=1e-05.*eps=0.01"),
    ("buffer", "(12,), 0.9)", "(12,), 0.8)", "tensor"),
    ("constant tensor", "(12,), 0.5)", "(12,), 0.75)", "tensor"),
    ("constant in a call", "0.1)", "0.2)", r"negative_slope=0.1.*negative_slope=0.2"),
    (
        "order",
        "torch.tanh(h) * self.mask + self.shift",
        "(torch.tanh(h) + self.shift) * self.mask",
        STEP,
    ),
    ("axis of softmax", "dim=1", "dim=0", r"softmax.*dim=1.*dim=0"),
    ("global value", "GLOBAL = 0.25", "GLOBAL = 0.5", STEP),
    ("helper's file", "x + 0.125", "x - 0.125", STEP),
    ("closure", "power = 2", "power = 3", STEP),
    ("lambda", "x**power", "x*power", STEP),
    (
        "hook",
        "        power = 2\n",
        "        power = 2\n        self.fc2.register_forward_hook(lambda m, i, o: 2 * o)\n",
        "hooks",
    ),
    (
        "own forward",
        "        power = 2\n",
        "        power = 2\n        self.act.forward = torch.tanh\n",
        "forward",
    ),
    (
        "autocast",
        "        h = (h @ self.turn)",
        "        with torch.autocast('cpu', torch.bfloat16):\n            h = (h @ self.turn)",
        "computation",
    ),
    (
        "layout",
        "        power = 2\n",
        "        power = 2\n        self.fc1.weight.data = torch.randn(16, 12).T\n",
        WEIGHTS,
    ),
    ("dropout", "nn.Dropout(0.2)", "nn.Dropout(0.4)", None),
    ("momentum", "eps=1e-5", "eps=1e-5, momentum=0.3", None),
    ("comment", "        h = F.leaky", "        # leaky\n        h = F.leaky", None),
    ("docstring", '"""A network."""', '"""Another text."""', None),
)
"""Edits of the network's code: what, text before, after, what the refusal must name."""

TRAINED: tuple[tuple[str, str, str, str | None], ...] = (
    ("dropout, fine-tuned", "nn.Dropout(0.2)", "nn.Dropout(0.4)", r"training\."),
    ("momentum, fine-tuned", "eps=1e-5", "eps=1e-5, momentum=0.3", r"training\."),
    (
        "training's branch",
        "        h = F.layer",
        "        if self.training:\n            h = h + 0.5\n        h = F.layer",
        r"training|computation",
    ),
    (
        "frozen",
        "        power = 2\n",
        "        power = 2\n        self.fc1.weight.requires_grad_(False)\n",
        "training.frozen",
    ),
)
"""Edits that tell only with ``--fine-tune``."""
