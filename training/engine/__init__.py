"""DeepSpeed and the ranks: the only wing that knows the insides of ZeRO. Import from its modules, not from here."""
