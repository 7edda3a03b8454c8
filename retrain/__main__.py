"""`python -m retrain`: the command line, as `torchrun -m retrain train ...` starts it."""

from retrain.cli import main

raise SystemExit(main())
