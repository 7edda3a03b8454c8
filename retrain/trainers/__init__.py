"""Training with torch: one shared loop, and what is built on it.

`supervised` is the loop, `masked` fine-tunes what has been pruned, `hptd` is the baseline that
truncates; `accuracy` evaluates.
"""
