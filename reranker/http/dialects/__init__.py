"""One module per dialect: its wire models and the rendering of a ranking."""
