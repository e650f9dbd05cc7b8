"""``python -m loraforge_cli``."""

from loraforge_cli.main import main

if __name__ == "__main__":
    main()
