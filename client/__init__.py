"""A data owner's side: data, policy, ledger, private training, and the link to a server."""
