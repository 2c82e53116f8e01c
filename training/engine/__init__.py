"""DeepSpeed and the ranks: the only wing that uses the internals of ZeRO. Import from its modules, not from here."""
