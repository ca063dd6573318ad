"""Memory of a step: measured in processes of its own, by the events of the allocator, as tables and plots."""
