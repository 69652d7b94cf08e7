"""Base, bank and gates folders: reading and writing them whole."""
