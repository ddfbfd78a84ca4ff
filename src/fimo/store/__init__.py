"""The store: results under keys that name all they depend on, and what these are made of."""
