"""A finished model at work: predictions, how good they are, what they rest on, and the model as a file for others."""
