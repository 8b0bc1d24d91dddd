"""Adapters on disk, read without a base model."""
