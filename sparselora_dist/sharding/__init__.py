"""Sharded parameters, whoever shards them: what one is, how it is read whole, which rows a rank keeps."""
