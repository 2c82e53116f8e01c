"""What a checkpoint folder is. Knows torch, but neither DeepSpeed nor training/.

The formats, their versions and their readers. A reader accepts every earlier version of its format and refuses later
ones.

| what                                  | version            | now    | reader                                     |
|---------------------------------------|--------------------|--------|--------------------------------------------|
| manifest.json                         | `format`           | 1      | manifest.read                              |
| run state, in the model's *.pt        | `version`          | 5      | state.RunState.from_dict, 1 to 5           |
| config.json with model.safetensors    | `format`           | 1      | gsa.weights.load_weights                   |
| *_states.pt, DeepSpeed's              | `ds_version`       | 0.19.8 | full_state.read_full_state                 |
| checkpoint_N.pt, legacy               | none, two variants |        | legacy.read_legacy_run, legacy.read_legacy |

Version 1 of the run state has no `epoch_offset`, `indexer_start` and `decided`, version 2 no `skipped`, version 3 no
`tokenizer_sha256`, `tokenizer_entries` and `eod_id`, and version 4 no `earlier_texts`. The fields of every file:
docs/checkpoints.md.
"""
