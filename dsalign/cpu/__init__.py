"""Savers of memory and time that only CPUs need."""
