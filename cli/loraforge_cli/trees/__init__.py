"""The commands of ``loraforge tree``, one a module."""
