"""Which parallel layouts fit on so many GPUs, and how fast they should be; no torch but in ``build``.

- `sources`, `layouts`, `search`: models of a run, candidates, which fit
- `parameters`, `activations`, `memory`: what a rank holds
- `storage`: where the optimizer has its states, and in how many bytes
- `schedule`, `cost`, `speed`, `hardware`: 1F1B, the time of a model's parts and of a step, what is assumed of a GPU
- `subsets`: which parts of a student fit where not all can be trained
- `preparation`: calibration and conversion before it
- `build`, `buffers`: the modules of every distinct rank on the meta device, and their buffers, to compare
- `flags`, `report`, `report_parts`: flags to paste, tables and JSON
"""
