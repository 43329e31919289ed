"""``python -m hf_lightsam``: the ``hf-lightsam`` command."""

from .cli import main

if __name__ == "__main__":
    main()
