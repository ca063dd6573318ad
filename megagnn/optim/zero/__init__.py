"""The optimizer sharded over data-parallel ranks: ZeRO stages 1 to 3, with offload."""
