"""A smaller model that does nearly the same: made, measured, and chosen."""
