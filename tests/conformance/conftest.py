import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before a peer reads it: no test may reach for the network
