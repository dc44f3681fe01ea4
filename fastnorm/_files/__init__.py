"""What ``fastnorm stats`` reads and prints: finding files, reading them, histograms, reports."""
