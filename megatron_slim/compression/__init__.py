"""From a recipe to a measured model: what `megatron-slim run` does.

- `settings`: recipe, command line and paths as one description of a run
- `steps`: the commands that it consists of, and what shows that one is done
- `checks`: what would fail later, refused at the start
- `state`: run.json, which says what was asked for and how far it is
- `runner`: runs what is not done yet
- `estimate`: tokens, bytes and time of every step before it begins
"""
