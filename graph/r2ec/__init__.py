"""R2ec: one LLM that reasons with its language head and ranks with a recommendation head."""
