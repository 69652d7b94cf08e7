"""`meteora` as a program that begins soon and compiles as tests do: `python tests/command.py serve ...`"""

import sys


def run() -> None:
    """transformers has to learn that there is no torch before its entry goes: tyro imports what has one."""
    from transformers.utils import is_torch_available

    from meteora_jax.cli import main

    assert not is_torch_available()  # and remembers it
    del sys.modules["torch"]
    compiling.use()
    main()


if __name__ == "__main__":
    import compiling
    import without_torch  # noqa: F401

    run()
