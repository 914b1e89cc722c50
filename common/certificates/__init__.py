"""Certificates: made, revoked, listed, and who is at the other end by theirs."""
