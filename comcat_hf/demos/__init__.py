"""What `comcat demo` and `comcat demo-customize` run."""
