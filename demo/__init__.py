"""`make demo`: one real fine-tuning run, three ways to pay for its activations."""
