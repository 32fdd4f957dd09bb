"""How do the weights reach other toolkits? One module a format, each export proven before it gets its name."""
