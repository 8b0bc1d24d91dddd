"""Tables, pictures and the model card."""
