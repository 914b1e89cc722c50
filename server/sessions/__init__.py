"""The links to clients."""
