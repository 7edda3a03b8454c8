"""Recipes: what to train, on what, how; TOML files and the names they may use."""

from __future__ import annotations

# A name, and where it lives; imported when a recipe asks for it.
ARCHITECTURES: dict[str, str] = {}
"""Architectures, ``"module:function"``; the [model] table's other keys are its arguments."""

METHODS: dict[str, str] = {
    "plain": "retrain.trainers.plain:Plain",
    "gates": "retrain.trainers.gates.method:Gates",
    "itp": "retrain.trainers.itp.method:Itp",
    "shrinknets": "retrain.trainers.shrinknets.method:ShrinkNets",
}
"""Methods, ``"module:Class"``; the [method] table's other keys are its fields."""
