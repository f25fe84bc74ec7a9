"""Ready-made task sets, one idea a file."""
