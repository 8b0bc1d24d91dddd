"""How an update acts on x: autograd, torch.compile, dtypes, devices; a file an operation."""
