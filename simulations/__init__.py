"""Many clients on one machine, and the demo."""
