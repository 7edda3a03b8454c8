"""Table 2(a) to (c) of the multiobjective paper, as printed."""

from __future__ import annotations

from typing import NamedTuple

TRADE_OFFS = (
    0.0,
    1e-5,
    3e-5,
    5e-5,
    7e-5,
    9e-5,
    1e-4,
    3e-4,
    5e-4,
    7e-4,
    9e-4,
    1e-3,
    3e-3,
    5e-3,
    7e-3,
)
CRITICAL = 3e-4
SIZES = (48_000, 10_080, 840)


class Printed(NamedTuple):
    """One row: losses, Omega_l1, nonzero weights of the three dense layers, test accuracy.

    The test accuracies of (b) are cut off in the text that this was read from.
    """

    train_loss: float
    test_loss: float
    complexity: float
    nonzero: tuple[int, int, int]
    test_accuracy: float | None

    @property
    def zero(self) -> float:
        """Share of the dense weights that are zero."""
        return 1 - sum(self.nonzero) / sum(SIZES)


# The captions of (a) and (b) are lost too. Section 6.2.1 gives epochwise pruning 64 % of layer3,
# 94 % and 96 % of the others at the critical trade-off: that is (b).
AFTER = (
    Printed(0.005, 0.069, 10670.627, (47794, 10045, 837), 0.987),
    Printed(0.010, 0.037, 2275.125, (18188, 4474, 616), 0.990),
    Printed(0.015, 0.035, 1102.737, (11424, 2444, 539), 0.991),
    Printed(0.029, 0.049, 795.104, (8140, 1881, 476), 0.987),
    Printed(0.024, 0.041, 629.910, (8171, 1592, 412), 0.988),
    Printed(0.030, 0.045, 507.737, (6086, 1222, 398), 0.988),
    Printed(0.028, 0.049, 499.282, (6356, 1337, 364), 0.987),
    Printed(0.048, 0.049, 215.541, (3668, 459, 203), 0.988),
    Printed(0.065, 0.064, 158.332, (3167, 937, 341), 0.983),
    Printed(0.076, 0.073, 119.347, (2399, 675, 266), 0.982),
    Printed(0.095, 0.097, 109.441, (2245, 308, 199), 0.975),
    Printed(0.095, 0.089, 106.567, (2226, 625, 251), 0.977),
    Printed(0.166, 0.150, 46.759, (893, 179, 150), 0.962),
    Printed(2.301, 2.301, 0.0, (0, 0, 0), 0.113),
    Printed(2.301, 2.301, 0.0, (0, 0, 3), 0.113),
)
EPOCH = (
    Printed(0.004, 0.048, 10780.185, (47817, 10050, 837), None),
    Printed(0.011, 0.045, 2540.030, (22114, 5596, 669), None),
    Printed(0.017, 0.040, 1173.861, (12793, 2801, 534), None),
    Printed(0.044, 0.060, 809.764, (9158, 1908, 409), None),
    Printed(0.024, 0.037, 632.278, (8293, 1470, 383), None),
    Printed(0.027, 0.042, 518.291, (6706, 1130, 366), None),
    Printed(0.028, 0.039, 452.222, (5796, 1013, 366), None),
    Printed(0.053, 0.059, 210.229, (2975, 443, 307), None),
    Printed(0.068, 0.066, 151.072, (2959, 674, 273), None),
    Printed(0.076, 0.077, 124.072, (2562, 667, 239), None),
    Printed(0.103, 0.096, 104.132, (2118, 401, 172), None),
    Printed(0.088, 0.084, 99.413, (1726, 371, 251), None),
    Printed(0.158, 0.147, 48.033, (916, 485, 150), None),
    Printed(0.175, 0.165, 32.276, (602, 150, 97), None),
    Printed(2.301, 2.301, 0.0, (0, 0, 5), None),
)
BATCH = (
    Printed(0.006, 0.046, 10542.293, (46551, 9830, 830), 0.990),
    Printed(0.009, 0.037, 2483.202, (17751, 4575, 614), 0.990),
    Printed(0.017, 0.038, 1227.385, (12582, 2434, 503), 0.988),
    Printed(0.023, 0.042, 833.953, (9260, 1689, 414), 0.989),
    Printed(0.031, 0.048, 610.605, (5946, 1192, 365), 0.987),
    Printed(0.026, 0.044, 523.644, (5779, 977, 298), 0.989),
    Printed(0.028, 0.046, 500.372, (5491, 907, 288), 0.988),
    Printed(0.049, 0.057, 208.399, (2107, 300, 170), 0.985),
    Printed(0.064, 0.065, 143.657, (1408, 179, 117), 0.983),
    Printed(0.077, 0.078, 115.643, (1253, 157, 116), 0.981),
    Printed(0.086, 0.081, 101.795, (1176, 178, 95), 0.980),
    Printed(0.091, 0.084, 86.395, (877, 99, 80), 0.979),
    Printed(0.134, 0.124, 44.547, (359, 62, 57), 0.972),
    Printed(2.302, 2.301, 0.0, (0, 0, 0), 0.113),
)
"""Its last row in the text is lambda = 0.005."""

TABLES = {"batch": BATCH, "epoch": EPOCH, "end": AFTER}
"""By when weights are pruned: (c), (b), (a)."""
