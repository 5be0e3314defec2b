"""The modules that take the place of a model's frozen layers, and what they share during a step."""
