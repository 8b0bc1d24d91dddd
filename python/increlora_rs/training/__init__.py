"""One training: hooks, resume, processes, Trainer. It knows policies, no method."""
