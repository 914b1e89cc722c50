"""A run to look at: a page with charts, a model card, and several runs beside each other, from their folders alone."""
