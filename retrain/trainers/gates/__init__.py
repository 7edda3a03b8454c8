"""Concurrent training and layer pruning with Bernoulli gates (Guenter and Sideris, 2024).

`block` is the gated block and its skips; `network` gates a module, and makes a network plain again;
`find` gates the residual blocks of an existing network; `gradients` is the gradient of the keep
probabilities, `gating` their steps, `absorb` the removal of a block; `method` is algorithm 1, and
`architectures` are the paper's networks, `images` a folder of images as arrays.
"""
