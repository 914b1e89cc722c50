"""What a client's owner wants to know before the first round: the server, the table, the budget."""
