"""Which collections can be read? One module each; the table SOURCES is in `data_prep.__main__`."""
