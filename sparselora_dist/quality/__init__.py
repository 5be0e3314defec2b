"""Which layers take how much sparsity: measured on the user's own data, before training."""
