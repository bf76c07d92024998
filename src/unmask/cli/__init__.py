"""The command line: one small file per verb, everything heavy imported inside it."""
