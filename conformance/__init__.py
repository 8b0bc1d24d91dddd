"""PEFT's own tests, run on our methods: ``python -m conformance`` (see docs/conformance.md)."""
