"""The federation document: YAML in, a validated model and its fingerprint out."""
