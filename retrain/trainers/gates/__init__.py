"""Concurrent training and layer pruning with Bernoulli gates (Guenter and Sideris, 2024).

`block` is the gated block and its skips, `network` finds or makes them in a model, `gradients` the
gradient of the keep probabilities, `absorb` removes a block, `method` is algorithm 1, and
`architectures` the paper's networks.
"""
