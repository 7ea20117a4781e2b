"""Fuzzing: nearly valid inputs for every place where featlas reads what others wrote, run through the command line."""
