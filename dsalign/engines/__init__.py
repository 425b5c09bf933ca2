"""The models of a run as DeepSpeed engines, and the collectives between ranks."""
