"""Single process, DeepSpeed ZeRO-3 and FSDP2 behind one interface. Each engine is touched in its own file only."""
