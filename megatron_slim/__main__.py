"""``python -m megatron_slim``: the ``megatron-slim`` command."""

from megatron_slim.cli.main import main

if __name__ == "__main__":
    main()
