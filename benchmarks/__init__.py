"""Measurements, one file a subject; each prints a table and stores it under results/."""
