"""Certify weights that somebody else computed.

The programs in `solvers` judge any pair of weights and multiplier from their own data, in float64,
whoever computed it. The weights give the objective and the violations. Any multiplier, even a
poor one, gives a valid lower bound on the optimum. The gap between the two is the certificate.

Two outsiders are judged here: scikit-learn's Lasso, which turns out to be optimal, and magnitude
thresholding, which does not.
"""

import numpy as np
from sklearn.linear_model import Lasso

from solvers import solve_newton, trim_program

rng = np.random.default_rng(0)
n_samples, n_in, n_out = 400, 40, 12
inputs = np.maximum(rng.standard_normal((n_samples, n_in)), 0)
dense = rng.standard_normal((n_in, n_out)) * np.where(rng.random((n_in, n_out)) < 0.3, 1, 0.05)
response = inputs @ dense

# 1. Scikit-learn's Lasso minimises |y - Xw|^2 / (2 n) + alpha |w|_1 for each unit. Divided by alpha
#    that is program (11) without an activation, with fit_weight = 1 / (2 n alpha).
alpha = 0.02
lasso = Lasso(alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=10_000)
theirs = lasso.fit(inputs, response).coef_.T
fit_weight = 1 / (2 * n_samples * alpha)
program = trim_program(inputs, response, fit_weight=fit_weight, activation="linear")

#    Lasso returns no multiplier, but at an optimum the multiplier is the gradient of the fit, which
#    its weights give. The certificate has one entry for each unit here.
multiplier = 2 * fit_weight * (inputs @ theirs - response)
certificate = program.certificate(theirs, multiplier)
print("scikit-learn's Lasso")
print(f"  objective {certificate.objective.sum():.6f}, bound {certificate.dual_bound.sum():.6f}")
print(f"  largest gap {certificate.gap.max():.1e}, zeros {np.mean(theirs == 0):.1%}")
print(f"  certified to 1e-6: {certificate.within(1e-6, 1e-6).all()}")

# 2. Magnitude thresholding of a ReLU layer: the smallest 60 % of the weights are set to zero.
cut = np.quantile(np.abs(dense), 0.6)
thresholded = np.where(np.abs(dense) > cut, dense, 0)
targets = np.maximum(response, 0)

#    Asked for a deviation of 2 %, the weights are told by how much they miss it: the violation.
strict = trim_program(inputs, targets, epsilon=0.02 * float(np.linalg.norm(targets)))
nothing = np.zeros_like(targets)  # a multiplier that proves only that the optimum is >= 0
missed = strict.certificate(thresholded, nothing)
print("magnitude thresholding")
print(f"  asked for a deviation of 2 %: ball missed by {missed.ball_violation:.1%}")
print(f"  and the ceilings by {missed.ceiling_violation:.1%} of |Y|")

#    Give them the radius and the ceilings that they reach, and they are admissible. Are they best?
reached = inputs @ thresholded
epsilon = float(np.linalg.norm((reached - targets)[targets > 0]))
loose = trim_program(
    inputs, targets, epsilon=epsilon, ceilings=np.maximum(reached, 0), old_weight=dense
)
ours = solve_newton(loose, tolerance=1e-5)
judged = loose.certificate(thresholded, ours.multiplier)
print(f"  at the deviation that they reach, {epsilon:.2f}: violation {judged.violation:.1e}")
print(f"  objective {judged.objective:.3f}, optimum at least {judged.dual_bound:.3f}")
print(f"  gap {judged.gap:.1%}: {'optimal' if judged.gap < 1e-4 else 'proven not optimal'}")

# 3. The weights that attain the bound, judged in the same way. The certificate is about the
#    objective, the sum of absolute weights; the number of zeros is another matter, as one sees.
certificate = loose.certificate(ours.weight, ours.multiplier)
print("solve_newton on the same program")
print(f"  objective {certificate.objective:.3f}, gap {certificate.gap:.1e}, {ours.status.value}")
print(f"  zeros {np.mean(np.asarray(ours.weight) == 0):.1%}, thresholding had 60.0%")
