"""Worker providers: one Ray actor per provider entry, with limits, health, retries, cache and wire formats."""
