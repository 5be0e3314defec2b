"""A model in its files, one decoder layer in memory at a time: what goes into each, and what another becomes."""
