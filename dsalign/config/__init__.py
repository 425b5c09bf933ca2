"""Options: what a run can be told, read and checked before torch is imported."""
