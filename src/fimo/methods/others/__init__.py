"""Other libraries' implementations as attribution methods, one module for each library."""
