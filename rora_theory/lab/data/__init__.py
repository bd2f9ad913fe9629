"""Records, prompts and batches."""
