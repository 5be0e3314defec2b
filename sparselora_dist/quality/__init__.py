"""How well the estimator does, and what a run did: measured, and shown."""
