"""From a recipe to a measured model: what `megatron-slim run` does, and the report that it ends with.

- `settings`: recipe, command line and paths as one description of a run
- `given`: a recipe with what the command line gives in its place
- `recordings`: the teacher's caches that a run records and trains from
- `steps`: the commands that it consists of, and what shows that one is done
- `checks`: what would fail later, refused at the start
- `queue`: jobs of the run that Slurm still has
- `state`: run.json, which says what was asked for and how far it is
- `runner`: runs what is not done yet
- `machine`: what a run computes on, and how long that takes
- `estimate`: tokens, bytes and time of every step before it begins
- `report`: writes the report: a page, its numbers as JSON, and the model card
- `report_inputs`: what lies in the directory of a run, read and checked
- `report_facts`, `report_curves`: the numbers of the report; losses of all phases over tokens
- `report_tables`, `report_recorded`, `report_quantization`, `report_page`: its tables, those of a recorded teacher and
  of the export in FP8, the page
- `card`, `card_source`: the model cards; what the teacher's own card and licence say
"""
