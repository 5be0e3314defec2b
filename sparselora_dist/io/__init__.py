"""Whatever touches disk: estimator factors, checkpoints, adapters, and the hashes that guard them."""
