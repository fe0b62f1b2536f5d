"""The distributed engines (DDP, FSDP2, DeepSpeed ZeRO) behind one protocol."""
