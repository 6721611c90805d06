"""DeepSpeed configurations shipped with the package, found by their bare file name."""
