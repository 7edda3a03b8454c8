"""Intra-training pruning: loss and complexity as two objectives, and the knee between them.

M. Reiners, K. Klamroth, M. Stiglmayr, "Efficient and Sparse Neural Networks by Pruning Weights in a
Multiobjective Learning Approach", 2020.

`objectives` are the two goals; `min_norm` is the subproblem (15) and `smgd` the optimisers on it;
`soft_pruning` zeroes small weights during training; `method` puts them together for a recipe.
`search` chooses trade-offs to train, `knee` the best of what they gave, and `knee_runs` does both
with one run directory a trade-off. `architectures` are the networks of table 1.
"""
