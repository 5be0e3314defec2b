"""Which layers take how much sparsity, how well the estimator chooses, and what a run did: measured on the user's data."""
