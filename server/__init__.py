"""The coordinator: rounds, strategies, admission, sessions and the run folder."""
