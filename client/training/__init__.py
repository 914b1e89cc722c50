"""Local training, with and without privacy. Knows neither network nor ledger."""
