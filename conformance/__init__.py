"""PEFT's own tests, run on ``IncreLoraConfig``: ``python -m conformance`` (see docs/conformance.md)."""
