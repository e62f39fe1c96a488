"""The command line: one module per command, without web framework and without `config.py`.

torch is imported when a model is loaded and not before, so that `--help`, bad arguments and `--url` respond fast.
"""
