"""The papers' own experiments, with the paper's figures beside ours."""
