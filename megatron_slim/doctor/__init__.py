"""What a machine, data and checkpoints lack for a run, as findings with fixes; no torch until it is asked for.

- `findings`: what a finding is
- `machine`, `packages`: the machine and its versions
- `patches`: what is changed in Megatron
- `preflight`: what a run is given
"""
