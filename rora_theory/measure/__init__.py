"""One batch of a model: the law's terms by module, real steps, and the rank coordinate check."""
