"""Plain helpers that know nothing of adapters."""
