"""A run's rounds: whom they ask, what they admit, how replies move the model."""
