"""One script per published number. Each prints its machine, versions and ratios measured side by side in one run."""

from benchmarks import openmp as openmp  # before anything here loads torch
