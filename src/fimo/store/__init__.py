"""The store: results under keys that name all they depend on, and what these are made of."""

VERSION = 2
"""Part of every key. Raise it when files of the store change their layout or meaning, or when something that
results depend on was missing from keys: nothing kept before is then read again. Edited code needs no raise,
since its source is in the keys."""
