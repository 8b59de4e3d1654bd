"""python -m finetune_kit"""

from finetune_kit.system import signals

signals.install()  # before the imports, which take a while


def main() -> None:
    """The command line, heard from its first import on."""
    from finetune_kit.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
