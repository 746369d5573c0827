"""Commands that work on finished runs: each is one package."""
