"""Read rows and texts from files of any supported form."""
