"""The command line of loraforge."""
