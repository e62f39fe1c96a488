"""The command line: one file a command, and one for each thing that the commands share. No web stack, no settings file.

torch is imported when a model is loaded and not before, so that `--help`, bad arguments and `--url` answer at once.
"""
