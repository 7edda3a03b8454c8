"""Training with torch: one shared loop, and what is built on it.

The loop: `supervised`, told what to do on its way by `callbacks`, fed by `batches` (`images`,
`augment`), computing as `computation` and `distributed` say. A training under way is a `Training`,
made by a method (`training`): `plain`, `gates`, `itp`, `shrinknets`. Recipes (`recipe`, `options`,
`schedules`, `architectures`, `start`) say what to train; `checkpoints` keep all of it, `account`
counts what it costs, `accuracy` evaluates. `retrain.runs.training` puts these together.

After pruning: `masked` fine-tunes, `hptd` is the baseline that truncates.
"""
