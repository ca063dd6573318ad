"""The loss of a run, and the methods by which its gradient is taken."""
