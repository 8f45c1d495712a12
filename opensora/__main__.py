"""`python -m opensora` and `torchrun -m opensora` are the `opensora` command."""

from opensora.cli.main import main

if __name__ == "__main__":
    main()
