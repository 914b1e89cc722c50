"""A run in a browser while it goes on: events in, a page that follows them out."""
