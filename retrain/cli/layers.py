"""`retrain layers`: what can be retrained."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from retrain.cli.shared import DONE, add_model, load, read_data

_SAMPLES = 4
"""Samples on which the network runs to be listed: two would do for its batch axis."""


def add_command(commands: Any) -> None:
    """Add `retrain layers` to the parser."""
    parser = commands.add_parser(
        "layers",
        help="list what can be retrained",
        description="List a saved network's layers: name, kind, shape, what follows, and whether "
        "they can be retrained.",
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        metavar="SRC",
        help="samples to run the network on, which shows what trim and lobs would retrain there; "
        "needed for networks with several inputs, token ids or control flow",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """List a model's layers."""
    from retrain.adapters.network.open import layer_table

    loaded = load(options)
    if options.data is None:
        layers = layer_table(loaded.module)
    else:
        options.limit, options.normalise, options.evaluate = _SAMPLES, None, None
        layers = layer_table(loaded.module, read_data(options)[0])
    if options.json:
        entries = [{**asdict(found.spec), "meets": found.meets} for found in layers]
        print(json.dumps({"note": loaded.note, "layers": entries}, indent=1))
        return DONE
    from retrain.report.terminal import layer_list, output

    console = output()
    if loaded.note:
        console.print(loaded.note, markup=False)
    console.print(layer_list(layers))
    return DONE
