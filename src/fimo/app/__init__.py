"""A run as a program: from a configuration to results, one run or a sweep of them."""
