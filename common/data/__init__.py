"""Tables to cells to tensors, without looking at the data."""
