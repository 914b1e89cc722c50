"""The model that is trained: its weights, its loss and its scores."""
