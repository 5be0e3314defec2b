"""What a run needs and how long its steps take, from the model's config alone."""
