"""What looks at a run as it goes."""
