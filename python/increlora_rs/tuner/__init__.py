"""PEFT's tuner over the methods."""
