"""Small calls of every kernel, for compute-sanitizer."""
