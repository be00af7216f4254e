from lora_sweep.process import run


def main() -> None:
    """Runs the program as this process; nothing else is imported before its signals have handlers."""
    run(_verb, goes_on=("launch", "train"))


def _verb() -> None:
    from lora_sweep.cli import main as verb

    verb()


if __name__ == "__main__":
    main()
