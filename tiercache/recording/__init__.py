"""Recording what a store is asked for, and reading it back. `FORMAT.md` beside this file specifies the file."""
