"""IncreLoRA (arXiv 2308.12043): ranks that grow where an importance says it pays."""
