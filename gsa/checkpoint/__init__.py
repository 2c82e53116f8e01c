"""What a checkpoint directory is. Knows torch, never DeepSpeed or training.

What is versioned, and what reads it. A reader takes every earlier version of its format; it refuses a later one,
and says so.

| what                                  | version            | now    | reader                                     |
|---------------------------------------|--------------------|--------|--------------------------------------------|
| manifest.json                         | `format`           | 1      | manifest.read                              |
| run state, in the model's *.pt        | `version`          | 3      | state.RunState.from_dict, of 1 to 3        |
| config.json with model.safetensors    | `format`           | 1      | gsa.weights.load_weights                   |
| *_states.pt, DeepSpeed's              | `ds_version`       | 0.19.8 | full_state.read_full_state                 |
| checkpoint_N.pt, the predecessor's    | none, two variants |        | legacy.read_legacy_run, legacy.read_legacy |

Version 1 of the run state lacks `epoch_offset`, `indexer_start` and `decided`, version 2 `skipped`: their runs had no
use for them. The fields of every file: docs/checkpoints.md.
"""
