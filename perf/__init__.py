"""What a hop costs. One question a file; each prints the baseline, the number and the ratio, all from one run."""
